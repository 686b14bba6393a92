"""How the demo's bundled data was made. Not part of the demo: the files it writes are committed.

    python jobs/demo/split.py uci_sentences.parquet    # columns text, label (0 or 1), source

1,000 of the 3,001 sentences become `train.parquet`: from each source and label the same share, in the order of a hash
of the text, so that the choice depends on nothing but the data. A sentence that occurs more than once is never chosen,
so no sentence of `train.parquet` stands in the lake. The other 2,001 become `lake/source=…/part-{0,1}.parquet`.
"""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter, defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).resolve().parent
TRAIN_ROWS = 1_000
FILES_PER_SOURCE = 2
LABELS = ("negative", "positive")
SCHEMA = pa.schema([("id", pa.int32()), ("text", pa.string()), ("label", pa.string())])


def split(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """Divide the rows into those to train on and those of the lake, each in the order of the input."""
    occurrences = Counter(row["text"].strip().lower() for row in rows)
    groups = defaultdict(list)
    for row in rows:
        groups[row["source"], row["label"]].append(row)
    chosen: set[int] = set()
    for number, key in enumerate(sorted(groups)):
        # 1,000 over six groups: the remainder of the division goes to the first groups, one row each.
        share = TRAIN_ROWS // len(groups) + (number < TRAIN_ROWS % len(groups))
        candidates = [row for row in groups[key] if occurrences[row["text"].strip().lower()] == 1]
        candidates.sort(key=lambda row: hashlib.sha256(row["text"].encode()).digest())
        chosen.update(row["id"] for row in candidates[:share])
    return [row for row in rows if row["id"] in chosen], [row for row in rows if row["id"] not in chosen]


def write(rows: list[dict], schema: pa.Schema, path: Path) -> None:
    """Write the rows' columns that the schema names as one zstd Parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([{name: row[name] for name in schema.names} for row in rows], schema=schema)
    # Two row groups or more in each file, so that the demo also reads by row group.
    pq.write_table(table, path, compression="zstd", compression_level=19, row_group_size=max(1, (len(rows) + 1) // 2))


def main() -> None:
    """Read the published sentences and write the demo's files beside this script."""
    parser = argparse.ArgumentParser(description="make the demo's bundled data")
    parser.add_argument("sentences", type=Path)
    table = pq.read_table(parser.parse_args().sentences, columns=["text", "label", "source"])
    rows = [
        {"id": number, "text": row["text"], "label": LABELS[row["label"]], "source": row["source"]}
        for number, row in enumerate(table.to_pylist())
    ]
    train, lake = split(rows)
    write(train, SCHEMA.append(pa.field("source", pa.string())), HERE / "train.parquet")
    for source in sorted({row["source"] for row in lake}):
        mine = [row for row in lake if row["source"] == source]
        half = -(-len(mine) // FILES_PER_SOURCE)
        for number in range(FILES_PER_SOURCE):
            part = mine[number * half : (number + 1) * half]
            write(part, SCHEMA, HERE / "lake" / f"source={source}" / f"part-{number}.parquet")
    print(f"{len(train)} rows to train on, {len(lake)} in the lake")


if __name__ == "__main__":
    main()
