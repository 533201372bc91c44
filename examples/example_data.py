"""Write the small data sets of the examples that have one of their own: each is learned by a tiny model on a CPU.

Usage: ``python example_data.py OUT_DIR [--seed 0] [--rows N]``

Dates (``csv_lora.yaml``). A date is to be written in another form, which is half taught to the base model and half left to
the CSV of a help desk, whose columns have names of their own:

    Write 7 March 2024 as ISO.                  2024-03-07
    How is 7 March 2024 written in America?     March 7, 2024
    How is 7 March 2024 written in Germany?     7. März 2024

* ``date_chats.jsonl``    ``messages``: the first kind alone;
* ``dates.csv``           ``id``, ``question``, ``answer``: the two others;
* ``dates_heldout.csv``   the same, of dates that are in neither of these files.

Tools (``tools.yaml``). A shop's assistant looks orders and items up before it answers. The result of a call decides the answer,
and is made up, so no answer can be known without the call:

    user: Where are Anna's lamps?
    assistant calls order_status {"customer": "Anna", "item": "lamps"}, which gives {"state": "sent", "days": 2}
    assistant: Anna's lamps are sent and arrive in 2 days.

* ``tool_chats.jsonl``    ``messages`` (one to four requests, of which some want no call) and ``tools``;
* ``tool_heldout.jsonl``  the same, each ending with a call or an answer, which ``expected`` has as the model has to write it;
                          its orders, a customer and an item each, are in no other chat.

Tickets (``own.yaml``). Rows in the shape of some ticket system, which no known format fits:

    {"id": 1, "status": "solved", "subject": "Order #417", "body": "Please cancel it.", "reply": "Order #417 is cancelled."}

* ``tickets.jsonl``, ``tickets_heldout.jsonl``  of orders in only one of them; a third of the tickets is not solved.

A fifth of all dates and orders is held out. The same seed gives the same bytes.
"""

import argparse
import csv
import datetime
import itertools
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

HELD_OUT_SHARE = 0.2
FIRST_DAY, DAYS = datetime.date(1980, 1, 1), 60 * 365
MONTHS = {
    "January": "Januar", "February": "Februar", "March": "März", "April": "April", "May": "Mai", "June": "Juni",
    "July": "Juli", "August": "August", "September": "September", "October": "Oktober", "November": "November",
    "December": "Dezember",
}  # fmt: skip
ITEMS = ("lamps", "chairs", "tables", "mugs", "bowls", "plates", "rugs", "clocks", "shelves", "mirrors")
CUSTOMERS = (
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Greta",
    "Henry",
    "Ida",
    "Jonas",
    "Lena",
    "Max",
    "Nora",
    "Otto",
)
STATES = ("packed", "sent", "delayed")
REQUESTS = {
    "Please cancel it.": "is cancelled",
    "It came broken.": "is sent again",
    "I paid twice.": "is refunded once",
    "Wrong colour.": "can be exchanged",
}

Row = dict[str, Any]


def split(rng: random.Random, things: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """(for training, held out), shuffled."""
    shuffled = list(things)
    rng.shuffle(shuffled)
    cut = round(len(shuffled) * HELD_OUT_SHARE)
    return shuffled[cut:], shuffled[:cut]


def message(role: str, content: str) -> Row:
    return {"role": role, "content": content}


# ------------------------------------------------------------------------------------------------ dates


def month(day: datetime.date) -> str:
    return list(MONTHS)[day.month - 1]


def spoken(day: datetime.date) -> str:
    return f"{day.day} {month(day)} {day.year}"


def date_chats(rng: random.Random, days: list[datetime.date], count: int) -> Iterator[Row]:
    """What the base model is taught: dates as ISO 8601 has them."""
    for day in rng.choices(days, k=count):
        yield {"messages": [message("user", f"Write {spoken(day)} as ISO."), message("assistant", day.isoformat())]}


def date_questions(rng: random.Random, days: list[datetime.date], count: int) -> Iterator[Row]:
    """Rows of the help desk, different ones: the American and the German form in turn."""
    for number, day in enumerate(rng.sample(days, count), 1):
        if number % 2:
            country, answer = "America", f"{month(day)} {day.day}, {day.year}"
        else:
            country, answer = "Germany", f"{day.day}. {MONTHS[month(day)]} {day.year}"
        yield {"id": number, "question": f"How is {spoken(day)} written in {country}?", "answer": answer}


# ------------------------------------------------------------------------------------------------ tools


def tool(name: str, *arguments: str) -> Row:
    """The JSON schema of a function of strings."""
    properties = {argument: {"type": "string"} for argument in arguments}
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


TOOLS = [tool("order_status", "customer", "item"), tool("stock", "item")]
Order = tuple[str, str]  # whose, and of what


def exchange(rng: random.Random, orders: list[Order]) -> list[Row]:
    """A request, the call it wants, the result, and the answer; or a request that wants none, and the answer."""
    kind = rng.choice(("order", "order", "stock", "stock", "thanks"))
    if kind == "thanks":
        return [message("user", "Thank you!"), message("assistant", "You are welcome.")]
    if kind == "order":
        (customer, item), state, days = rng.choice(orders), rng.choice(STATES), rng.randint(2, 5)
        question, called, arguments = (
            f"Where are {customer}'s {item}?",
            "order_status",
            {"customer": customer, "item": item},
        )
        result: Row = {"state": state, "days": days}
        answer = f"{customer}'s {item} are {state} and arrive in {days} days."
    else:
        item, left = rng.choice(ITEMS), rng.choice((0, 2, 3, 4, 5))
        question, called, arguments = f"Do you have {item}?", "stock", {"item": item}
        result = {"left": left}
        answer = f"There are {left} {item} left." if left else f"No {item} are left."
    call = {"type": "function", "function": {"name": called, "arguments": arguments}}
    return [
        message("user", question),
        {"role": "assistant", "tool_calls": [call]},
        message("tool", json.dumps(result)),
        message("assistant", answer),
    ]


def tool_chats(rng: random.Random, orders: list[Order], count: int) -> Iterator[Row]:
    for _ in range(count):
        messages = [each for _ in range(rng.randint(1, 4)) for each in exchange(rng, orders)]
        yield {"messages": messages, "tools": TOOLS}


def tool_questions(rng: random.Random, orders: list[Order], count: int) -> Iterator[Row]:
    """Chats that end with a call, and chats that end with an answer after its result, in turn."""
    for number in range(count):
        messages: list[Row] = []
        while len(messages) < 4 or "tool_calls" not in messages[-3]:  # until the last exchange has a call
            messages += exchange(rng, orders)
        messages = messages if number % 2 else messages[:-2]
        yield {"messages": messages, "tools": TOOLS, "expected": written(messages[-1])}


def written(answer: Row) -> str:
    """An answer, or a call as the template `hermes` has the model write it."""
    if "content" in answer:
        return str(answer["content"])
    (call,) = answer["tool_calls"]
    return f"<tool_call>\n{json.dumps(call['function'])}\n</tool_call>"


# ------------------------------------------------------------------------------------------------ tickets


def tickets(rng: random.Random, orders: list[str], count: int) -> Iterator[Row]:
    for number in range(1, count + 1):
        order, (body, done) = rng.choice(orders), rng.choice(list(REQUESTS.items()))
        reply = f"Order {order} {done}." if number % 3 else None
        status = "solved" if reply else "open"
        yield {"id": number, "status": status, "subject": f"Order {order}", "body": body, "reply": reply}


# ------------------------------------------------------------------------------------------------ files


def write(path: Path, rows: Iterator[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_csv(path: Path, rows: Iterator[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["id", "question", "answer"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def generate(out_dir: Path, seed: int = 0, rows: int = 4000) -> None:
    """Write the seven files into ``out_dir``, which is made if it is missing; ``rows`` are those of the largest."""
    rng = random.Random(seed)
    days, new_days = split(rng, (FIRST_DAY + datetime.timedelta(n) for n in range(DAYS)))
    orders, new_orders = split(rng, itertools.product(CUSTOMERS, ITEMS))
    numbers, new_numbers = split(rng, (f"#{n}" for n in range(100, 1000)))
    heldout = max(1, min(200, rows // 10))
    out_dir.mkdir(parents=True, exist_ok=True)
    write(out_dir / "date_chats.jsonl", date_chats(rng, days, rows))
    write_csv(out_dir / "dates.csv", date_questions(rng, days, rows // 2))
    write_csv(out_dir / "dates_heldout.csv", date_questions(rng, new_days, heldout))
    write(out_dir / "tool_chats.jsonl", tool_chats(rng, orders, rows // 2))
    write(out_dir / "tool_heldout.jsonl", tool_questions(rng, new_orders, heldout))
    write(out_dir / "tickets.jsonl", tickets(rng, numbers, rows))
    write(out_dir / "tickets_heldout.jsonl", tickets(rng, new_numbers, heldout))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the data sets of csv_lora, tools and own.")
    parser.add_argument("out_dir", type=Path, help="where to write the files")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes (default: 0)")
    parser.add_argument("--rows", type=int, default=4000, help="rows of the largest file (default: 4000)")
    args = parser.parse_args()
    generate(args.out_dir, args.seed, args.rows)


if __name__ == "__main__":
    main()
