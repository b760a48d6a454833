"""A worker's loop with LoRAs: what it observes of them, and what it knows to be open."""

from __future__ import annotations

import threading
import time
from multiprocessing import Pipe
from pathlib import Path

from calotype.runtime.adapters.lora import Lora
from calotype.runtime.request import Request
from calotype.serving.tasks import Drawn, Task
from calotype.serving.workers.costs import SWITCH, TEXT
from calotype.serving.workers.messages import Failed, Happened, Open, OpenFailed, Ready, Stop, Submit
from calotype.serving.workers.outlines import outline_of
from calotype.serving.workers.served import Served
from calotype.serving.workers.worker import Worker
from tests.runtime.lora_files import TEXT as ENCODER
from tests.runtime.lora_files import UNET, write_lora

TIMEOUT = 120.0


def test_a_switch_is_observed_where_it_opens_something_and_what_is_open_is_known(tmp_path: Path) -> None:
    style = write_lora(tmp_path / "style.safetensors", 1, (UNET,))
    words = write_lora(tmp_path / "words.safetensors", 2, (ENCODER,))  # changes no weights of jobs
    order = Open(name="talbot", bundle="talbot", backend="cpu", threads=1, sizes=((64, 64),))
    model = Served.of(order)
    ours, theirs = Pipe()
    worker = Worker(theirs)
    thread = threading.Thread(target=worker.serve)
    thread.start()
    seen: list[str] = []

    def wait_for(kind: type) -> None:
        """Until a report of that kind, or an event of it."""
        while True:
            assert ours.poll(TIMEOUT), "it is silent"
            report = ours.recv()
            assert not isinstance(report, Failed | OpenFailed), report
            if isinstance(report, Happened):
                seen.extend(one.stage for one in report.observations if one.stage in (TEXT, SWITCH))
                if any(isinstance(event, kind) for _, event in report.events):
                    return
            elif isinstance(report, kind):
                return

    try:
        ours.send(order)
        wait_for(Ready)
        seen.clear()
        for number, path in enumerate((style, None, style, words, style, words)):
            loras = () if path is None else (Lora(path=path),)
            request = Request(prompt="red", seed=1, num_inference_steps=1, height=64, width=64, loras=loras)
            outline = outline_of("talbot", model.manifest, request)
            task = Task(id=str(number), model="talbot", request=request)
            assert worker.kept("talbot", outline.weights) == (path is None or number in (2, 4, 5))
            ours.send(Submit(task=task, outline=outline, accepted=time.monotonic()))
            wait_for(Drawn)
        assert seen == [SWITCH, TEXT, TEXT, SWITCH, TEXT, TEXT]
        assert not worker.kept("talbot", (Lora(path=style, scale=0.5),))
    finally:
        ours.send(Stop())
        thread.join(TIMEOUT)
        for own in worker._openings.models.values():
            own.pipeline.close()
