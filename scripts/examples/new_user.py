"""Makes the files of somebody who tries dynrank for the first time: ``python scripts/examples/new_user.py FOLDER``.

FOLDER/tickets.csv has 2,000 texts with one of four labels, FOLDER/talks.jsonl has 500 chats with one answer each.
FOLDER/support.csv, as a spreadsheet writes it (semicolons, byte-order mark), has 1,498 texts of 7 classes, the rarest
has 18.
docs/command_line.md says how dynrank-train reads them.
"""

import csv
import json
import random
import sys
from pathlib import Path

PRODUCTS = ["router", "printer", "scanner", "phone", "tablet", "monitor", "camera", "charger", "keyboard", "speaker"]
PLACES = ["office", "warehouse", "shop", "school", "library", "clinic", "hotel", "garage", "kitchen", "studio"]
TICKETS = {
    "account": ["cannot log in to the {0} portal", "the password of our {1} was rejected", "please unlock user {2}"],
    "billing": ["invoice {2} for the {0} is too high", "the {1} was charged twice", "refund order {2}, please"],
    "delivery": ["parcel {2} never came to the {1}", "the {0} arrived at another {1}", "where is shipment {2}?"],
    "repair": ["the {0} in the {1} smells of smoke", "screen of {0} {2} is broken", "our {0} makes a grinding noise"],
}

# {class: (number of its rows, what is written)}
SUPPORT = {
    "login": (420, ["I cannot sign in since {2}", "my password for the {0} is refused", "locked out of account {2}"]),
    "invoice": (360, ["invoice {2} has the wrong address", "charged twice for the {0}", "please refund order {2}"]),
    "shipping": (280, ["parcel {2} has not come to the {1}", "the {0} went elsewhere", "tracking {2} is empty"]),
    "hardware": (210, ["the {0} in the {1} smells of smoke", "screen of {0} {2} is cracked", "the {0} grinds loudly"]),
    "licence": (130, ["licence key {2} is not accepted", "how many seats has our {1}?", "renew licence {2}"]),
    "feedback": (80, ["the new {0} is wonderful", "thank you for the help in the {1}", "your {1} was friendly"]),
    "privacy": (18, ["delete all data about customer {2}", "which data have you on {2}?", "export my data, {2}"]),
}


def main(folder: Path) -> None:
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "tickets.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["body", "topic"])
        for number in range(2000):
            topic = draw.choice(list(TICKETS))
            words = draw.choice(PRODUCTS), draw.choice(PLACES), str(1000 + number)
            rows.writerow([f"{draw.choice(TICKETS[topic]).format(*words)} (case {number})", topic])
    classes = [name for name, (count, _) in SUPPORT.items() for _ in range(count)]
    draw.shuffle(classes)
    with (folder / "support.csv").open("w", newline="", encoding="utf-8-sig") as file:
        rows = csv.writer(file, delimiter=";")
        rows.writerow(["Number", "Body", "Topic"])
        for number, name in enumerate(classes, 1):
            words = draw.choice(PRODUCTS), draw.choice(PLACES), str(10000 + number)
            rows.writerow([number, draw.choice(SUPPORT[name][1]).format(*words), name])
    with (folder / "talks.jsonl").open("w", encoding="utf-8") as file:
        for number in range(500):
            product = draw.choice(PRODUCTS)
            place = draw.choice(PLACES)
            question = f"Who looks after the {product} in the {place}, room {number}?"
            answer = f"The {product} desk. Ask for the {place} team and name room {number}."
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
