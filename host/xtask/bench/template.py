"""torchtune's own way from rows to messages with its summary template, on one core.

Usage: template.py ROWS.jsonl
Prints rows a second, the best of five passes over up to 20,000 rows.
"""

import json
import sys
import time
from itertools import islice

from torchtune.data import InputOutputToMessages, SummarizeTemplate


def main(rows_path: str) -> None:
    with open(rows_path) as file:
        rows = [json.loads(line) for line in islice(file, 20_000)]
    to_messages = InputOutputToMessages(column_map={"input": "document", "output": "summary"})
    template = SummarizeTemplate()
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        for row in rows:
            template(to_messages(row)["messages"])
        seconds.append(time.perf_counter() - started)
    print(len(rows) / min(seconds))


if __name__ == "__main__":
    main(sys.argv[1])
