"""Reads a run's event file with TensorBoard's own package and compares it with the losses of its checkpoint.

Usage: events.py OUTPUT_DIR, of a run with `metric_logger=TensorBoardLogger`.
"""

import json
import struct
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

out = Path(sys.argv[1])
[folder] = (out / "logs").iterdir()
events = EventAccumulator(str(folder))
events.Reload()
single = lambda value: struct.unpack("f", struct.pack("f", value))[0]
losses = json.loads((out / "epoch_0" / "losses.json").read_text())
for tag, points in (("loss", losses["training"]), ("val_loss", losses["validation"])):
    found = [(event.step, event.value) for event in events.Scalars(tag)]
    expected = [(step, single(loss)) for step, loss in points]
    if found != expected or not found:
        sys.exit(f"{tag}: TensorBoard reads {found}, the run had {expected}")
    print(f"{tag}: {len(found)} points as the run had them")
print("tags:", ", ".join(sorted(events.Tags()["scalars"])))
