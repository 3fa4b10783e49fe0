"""What a log without a readable loss is, in one sentence."""

from eval.diagnosis.log_reader import LogReader
from eval.diagnosis.tables import split_cells

BINARY = (
    (b"brain.Event:", "a TensorBoard event file; write its scalars to csv, a column a loss, or pass the text log"),
    (b":W&B", "a W&B run file; export its history to csv, or pass the text log"),
    (b"\x89PNG", "a picture; pass the log that it was drawn from"),
    (b"%PDF", "a PDF; pass the log that it tells of"),
    (b"SQLite format 3", "an SQLite file; export the run's losses to csv"),
)  # fmt: skip
EXPECTED = 'expected lines such as {"step": 10, "loss": 2.3}, step: 10, loss: 2.3, a csv with a column of losses or a trainer_state.json'  # noqa: E501
CONTROLS = bytes(set(range(32)) - set(b"\t\n\r\x1b\b"))
SHOWN = 8  # column names in a sentence


def no_loss(path: str, reader: LogReader) -> str:
    """Why there is nothing to judge: what was found in the log, and what to pass instead."""
    run, head = reader.run, reader.head
    for mark, what in BINARY:
        if mark in head[:64]:
            return f"{path} has no readable loss: it is {what}"
    if not head.strip(b"\x00 \r\n\t"):
        return f"{path} has no readable loss: it is empty; {EXPECTED}"
    if run.passed["doubt"] or run.passed["best"]:
        lines = run.passed["doubt"] + run.passed["best"]
        found = f"{lines} lines with one that may be an evaluation's or a record told again"
        return f"{path} has no readable loss, only {found}; {EXPECTED}"
    if "trainer_state" in reader.signs:
        return f"{path} has no readable loss: its log_history holds none; pass the one of a later checkpoint"
    if "deepspeed" in reader.signs and run.stepless:
        return (
            f"{path} tells {run.stepless} steps but no loss (DeepSpeed's own lines hold only learning rates); pass the "
            "log that prints the loss, or let the training print it"
        )
    columns = column_names(head)
    if columns:
        told = ", ".join(columns[:SHOWN]) + (", …" if len(columns) > SHOWN else "")
        return f"{path} has no readable loss: it is a table with the columns {told}, of which none is named as a loss"
    if run.stepless:
        return f"{path} tells {run.stepless} steps but no loss; let the training print it; {EXPECTED}"
    if len(head.translate(None, CONTROLS)) < 0.95 * len(head):
        return f"{path} has no readable loss: it is binary; pass the training's text log"
    return f"{path} has no readable loss; {EXPECTED}"


def column_names(head: bytes) -> list[str]:
    """The column names that a log begins with when it is a csv or tsv, else nothing."""
    first, _, rest = head.lstrip(b"\xef\xbb\xbf\r\n").partition(b"\n")
    second = rest.partition(b"\n")[0]
    for delimiter in (b"\t", b",", b";"):
        names = [cell.strip().strip(b'"') for cell in split_cells(first, delimiter)] if delimiter in first else []
        same = len(split_cells(second, delimiter)) == len(names)
        if same and all(0 < len(name) <= 40 and name[:1].isalpha() and b":" not in name for name in names):
            return [name.decode("utf-8", "replace") for name in names]
    return []
