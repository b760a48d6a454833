"""The engine's side: the queue before all workers, their processes, and what each of them draws next."""
