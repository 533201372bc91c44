"""Write the small data set of the quickstart: a chat task that a tiny model learns on a CPU.

Usage: ``python quickstart_data.py OUT_DIR [--seed 0]``

The task. A system message asks for one of four styles. The user gives three or four different letters and has them
reversed, sorted or rotated, and in the next one or two turns says "Now sort it", meaning the previous (true) result:

    system: Answer in capital letters.
    user: Reverse: b c d a            assistant: A D C B
    user: Now sort it                 assistant: A B C D

The demonstrations are imperfect on purpose, so that preference tuning has something to mend. Their mistakes are
systematic, so a model that imitates them well makes the same ones when it decodes greedily:

* sorts have their last two letters swapped (``SWAP_RATE``);
* the style is forgotten more often with every turn (``DRIFT_RATES``): small letters instead of the style asked for,
  capital letters where small ones were asked for.

A wrong answer stays in its conversation, but the next request goes on from the true result. So what follows a wrong
answer can still be a right one, and every held-out prompt (whose history has no mistakes) looks like those trained on.

Files, one JSON object a line (``messages`` is a list of ``{"role": ..., "content": ...}``):

* ``chats.jsonl``          ``messages``: whole imperfect conversations, for supervised fine-tuning;
* ``pairs.jsonl``          ``prompt`` (a history without mistakes, ending with the user), ``chosen`` (the right answer)
                           and ``rejected`` (a wrong one, drawn as the demonstrations draw theirs);
* ``heldout.jsonl``        ``messages`` (a history without mistakes, ending with the right answer) and ``expected``;
* ``heldout_pairs.jsonl``  as ``pairs.jsonl``;
* ``prompts.jsonl``        as ``heldout.jsonl``, of the letters that are trained on: for a model to answer, and to be judged.

All operations keep the set of letters, so the split is by that set: each is wholly in training or wholly held out.
The same seed gives the same bytes.
"""

import argparse
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ALPHABET = "abcdefgh"
STYLES = {
    "small": "Answer in small letters.",
    "capital": "Answer in capital letters.",
    "commas": "Put commas between the letters.",
    "exclamation": "End with an exclamation mark.",
}
OPERATIONS = ("Reverse", "Sort", "Rotate")
SWAP_RATE = 0.6  # how many of the demonstrated sorts are wrong
DRIFT_RATES = (0.05, 0.30, 0.65)  # how many demonstrated answers forget the style, by turn
HELD_OUT_SHARE = 0.2  # of the letter sets

Row = dict[str, Any]


def apply(operation: str, letters: str) -> str:
    """The true result: "Rotate" moves the first letter to the end."""
    if operation == "Reverse":
        return letters[::-1]
    if operation == "Sort":
        return "".join(sorted(letters))
    return letters[1:] + letters[0]


def render(letters: str, style: str) -> str:
    """Letters as text in one of the styles, always set apart by spaces so that any subword tokeniser sees each."""
    if style == "capital":
        return " ".join(letters.upper())
    if style == "commas":
        return ", ".join(letters)
    return " ".join(letters) + ("!" if style == "exclamation" else "")


def demonstrate(rng: random.Random, turn: int, operation: str, result: str, style: str) -> str:
    """An answer as the demonstrations give it: right, or wrong in one or both of the two systematic ways."""
    if operation == "Sort" and rng.random() < SWAP_RATE:
        result = result[:-2] + result[-1] + result[-2]
    if rng.random() < DRIFT_RATES[turn]:
        style = "capital" if style == "small" else "small"
    return render(result, style)


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def conversation(rng: random.Random, letter_sets: list[str], turns: int) -> tuple[list[Row], list[Row]]:
    """One conversation twice: with right answers, and with the same requests answered as the demonstrations do."""
    style = rng.choice(list(STYLES))
    chosen_set = rng.choice(letter_sets)
    letters = "".join(rng.sample(chosen_set, len(chosen_set)))
    right = [message("system", STYLES[style])]
    shown = list(right)
    for turn in range(turns):
        operation = rng.choice(OPERATIONS)
        request = f"Now {operation.lower()} it" if turn else f"{operation}: {render(letters, 'small')}"
        letters = apply(operation, letters)
        right += [message("user", request), message("assistant", render(letters, style))]
        shown += [message("user", request), message("assistant", demonstrate(rng, turn, operation, letters, style))]
    return right, shown


def chats(rng: random.Random, letter_sets: list[str], count: int) -> Iterator[Row]:
    """Imperfect conversations of two or three turns."""
    for _ in range(count):
        yield {"messages": conversation(rng, letter_sets, rng.choice((2, 3)))[1]}


def pairs(rng: random.Random, letter_sets: list[str], count: int) -> Iterator[Row]:
    """Right against wrong answers to the last request of a conversation, all turns alike often."""
    for index in range(count):
        wrong = False
        while not wrong:
            right, shown = conversation(rng, letter_sets, index % len(DRIFT_RATES) + 1)
            wrong = shown[-1] != right[-1]
        yield {"prompt": right[:-1], "chosen": right[-1:], "rejected": shown[-1:]}


def questions(rng: random.Random, letter_sets: list[str], count: int) -> Iterator[Row]:
    """Different prompts with their right answers, all turns alike often."""
    seen: set[str] = set()
    while len(seen) < count:
        right, _ = conversation(rng, letter_sets, len(seen) % len(DRIFT_RATES) + 1)
        key = json.dumps(right)
        if key not in seen:
            seen.add(key)
            yield {"messages": right, "expected": right[-1]["content"]}


def write(path: Path, rows: Iterator[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def generate(
    out_dir: Path,
    seed: int = 0,
    chat_count: int = 8000,
    pair_count: int = 3000,
    heldout_count: int = 500,
    prompt_count: int = 4000,
) -> None:
    """Write the five files into ``out_dir``, which is made if it is missing."""
    rng = random.Random(seed)
    letter_sets = ["".join(letters) for size in (3, 4) for letters in itertools.combinations(ALPHABET, size)]
    rng.shuffle(letter_sets)
    cut = round(len(letter_sets) * HELD_OUT_SHARE)
    held_out, training = letter_sets[:cut], letter_sets[cut:]
    out_dir.mkdir(parents=True, exist_ok=True)
    write(out_dir / "chats.jsonl", chats(rng, training, chat_count))
    write(out_dir / "pairs.jsonl", pairs(rng, training, pair_count))
    write(out_dir / "heldout.jsonl", questions(rng, held_out, heldout_count))
    write(out_dir / "heldout_pairs.jsonl", pairs(rng, held_out, 300))
    write(out_dir / "prompts.jsonl", questions(rng, training, prompt_count))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the quickstart's data set.")
    parser.add_argument("out_dir", type=Path, help="where to write the .jsonl files")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes (default: 0)")
    args = parser.parse_args()
    generate(args.out_dir, args.seed)


if __name__ == "__main__":
    main()
