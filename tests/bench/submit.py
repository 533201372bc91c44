"""What it costs to run the chain through `raylign submit`: beside the same run on the same Ray head, and on this machine alone.

    python -m tests.bench.submit [--rounds 3]

The spec is that of tests/integration/test_chain.py: base -> SFT -> reward, DPO -> evaluation, a tiny model. Rounds alternate, each
in a storage of its own; seconds from the command's start to its end, and how many of them are not the run's own (run.json): those
are what submitting costs, whatever else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from stages import forkserver
from tests.conftest import LLAMA, chat, write_jsonl
from tests.integration.test_chain import SPEC
from tests.integration.test_submit import clean, ray_head


def make_data(folder: Path) -> None:
    rng = random.Random(0)
    write_jsonl(folder / "chats.jsonl", [{"messages": chat(rng, rng.choice((1, 2, 3)))} for _ in range(101)])
    rows = [chat(rng) for _ in range(57)]
    pairs = [
        {"prompt": m[:-1], "chosen": m[-1:], "rejected": [m[-1] | {"content": m[-1]["content"] + " h"}]} for m in rows
    ]
    write_jsonl(folder / "pairs.jsonl", pairs[:37])
    write_jsonl(folder / "heldout.jsonl", [{"messages": m, "expected": m[-1]["content"]} for m in rows[37:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    del os.environ[forkserver.WANTED]  # each run does the imports anew, as those of users do
    root = Path(tempfile.mkdtemp(prefix="bench-submit-"))
    (work := root / "work").mkdir()
    make_data(work)
    (work / "spec.yaml").write_text(SPEC.format(data=".", config=json.dumps(LLAMA)))
    outside: dict[str, list[float]] = defaultdict(list)
    seconds: dict[str, list[float]] = {"submit": [], "direct, same head": [], "direct, this machine": []}
    with ray_head(root / "head.log") as head:
        for number in range(rounds):
            for name, taken in seconds.items():
                storage = root / f"{name.replace(' ', '-')}-{number}"
                way = ["submit", "spec.yaml", "--address", head.address] if name == "submit" else ["run", "spec.yaml"]
                env = clean(**head.token) | ({"RAY_ADDRESS": head.gcs} if name == "direct, same head" else {})
                if "machine" in name:
                    env = clean()
                started = time.monotonic()
                command = [sys.executable, "-m", "pipeline", *way, "--set", f"storage={storage}"]
                done = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True, check=False)
                assert done.returncode == 0, done.stdout + done.stderr
                taken.append(time.monotonic() - started)
                state = json.loads((storage / "chain" / "run.json").read_text())
                outside[name].append(taken[-1] - (state["finished"] - state["started"]))
                print(f"{name:22} {taken[-1]:6.1f} s, {outside[name][-1]:5.1f} outside of the run", flush=True)
    for name in list(seconds)[1:]:
        for what, taken in (("in all", seconds), ("outside of the run", outside)):
            one, other = statistics.median(taken["submit"]), statistics.median(taken[name])
            print(f"submit - {name}, {what}: {one - other:+.1f} s (medians {one:.1f}, {other:.1f})")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
