"""The denoising loop: jobs, each a picture on its way, and one network that serves their rows."""
