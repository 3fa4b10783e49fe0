"""How good predictions of faq/predict.sh are, from files whose questions have a true intent.

python faq/score.py predictions.jsonl [unconstrained.jsonl ...]
Prints one JSON object on stdout: {"results": [one per file], "coverage", and with --train_file "baselines",
"recommendation", "training_data"}; draws the confusions of the first file and its coverage.

Definitions: accuracy is the share of questions whose predicted intent is the true one. Precision, recall and F1 of an
intent are of one against the rest; macro F1 is their plain mean over the true intents, those predicted by mistake
included when they are candidates (as in scikit-learn's default). The standard error is that of a proportion, the
interval its 95% one (Wilson 1927).
"""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from faq import coverage
from faq.confusions import draw_confusions
from llmops import files, json_text, pictures
from llmops.console import Parser, UserError, log, print_json, run_main, stdout_to_stderr, to_bool
from llmops.intents.catalog import Catalog, load_catalog, wording_of
from llmops.intents.questions import INTENTS_NAME

if TYPE_CHECKING:
    from llmops.intents.classifiers import Asked

TOP_PAIRS = 10
FIGURES = ("accuracy", "accuracy_standard_error", "macro_f1", "none_of_the_intents")  # of simple classifiers
JOINED = "both joined"
FEWEST_JUDGED = 20  # questions, for a calibration on halves
WIDE = 0.2  # an interval of the accuracy that says little


def build_parser() -> argparse.ArgumentParser:
    """Every setting with its default."""
    parser = Parser(prog="score.py", description="Score intent predictions.", allow_abbrev=False)
    parser.add_argument("predictions", nargs="+", help="output files of faq/predict.sh")
    parser.add_argument("--picture", default="", help="PNG of the confusions; empty: beside the first file")
    add = parser.add_argument
    add("--intents_file", default="", help=f"{INTENTS_NAME}; empty: beside the first file")
    add(
        "--train_file",
        default="",
        help="what the model learned from, train.jsonl, for baselines and advice",
    )
    add("--embedding_model", default="", help="folder of a sentence embedding model for the baselines; empty: n-grams")
    add("--untuned_file", default="", help="predictions of the base model for the same questions, as one more baseline")
    add("--precision", type=float, default=0.95, help="how often an automated answer should be right")
    add("--automate", type=float, default=0.0, help="instead of --precision: the share of questions to automate")
    add("--keep_threshold", type=to_bool, default=False, metavar="true|false",
        help=f"write calibration and threshold into {INTENTS_NAME}, for predict.sh")  # fmt: skip
    add("--join", type=to_bool, default=False, metavar="true|false",
        help="keep the threshold of model and linear classifier together, for predict.sh --join_file")  # fmt: skip
    add("--suspects_file", default="", help="write training questions that are probably mislabelled there")
    return parser


def check(arguments: argparse.Namespace) -> None:
    """Raise UserError that lists every problem of the settings."""
    problems = []
    if not 0 < arguments.precision <= 1:
        problems.append(f"--precision is {arguments.precision}, expected a share above 0 and up to 1, such as 0.95")
    if not 0 <= arguments.automate <= 1:
        problems.append(f"--automate is {arguments.automate}, expected a share from 0 to 1")
    wanting = [
        name for name in ("embedding_model", "suspects_file", "join", "untuned_file") if getattr(arguments, name)
    ]
    if wanting and not arguments.train_file:
        problems.append(f"--{' and --'.join(wanting)} need the --train_file that the model learned from")
    if arguments.join and not arguments.keep_threshold:
        problems.append("--join is kept with --keep_threshold true; pass both")
    if problems:
        raise UserError("; ".join(problems))
    if arguments.embedding_model:
        from llmops.embedding.folder import read_folder

        read_folder(Path(arguments.embedding_model))


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """The lines of a file. Raises UserError for a line that is no prediction with a true intent."""
    found = []
    cure = "faq/predict.sh --output_file writes such a file"
    for number, row, problem in files.json_lines(path, "the predictions", cure):
        if problem:
            raise UserError(f"{path}:{number}: {problem}")
        is_row = isinstance(row, dict)
        wrong = [key for key in ("intent", "reference") if not is_row or not isinstance(row.get(key), str)]
        if wrong:
            raise UserError(
                f"{path}:{number}: no {wrong[0]!r}; expected a prediction of faq/predict.sh for a question "
                "whose true intent is known"
            )
        flags = [key for key in ("known", "constrained") if not isinstance(row.get(key, True), bool)]
        if flags:
            raise UserError(f"{path}:{number}: {flags[0]!r} is {files.shown(row[flags[0]])}, expected true or false")
        probability = row.get("probability", 0.0)
        if not isinstance(probability, int | float) or not 0 <= probability <= 1:
            raise UserError(f"{path}:{number}: 'probability' is {files.shown(probability)}, expected 0 to 1")
        shares = row.get("probabilities", {})
        good = isinstance(shares, dict) and all(type(p) in (int, float) and 0 <= p <= 1 for p in shares.values())
        if not isinstance(row.get("question", ""), str) or not is_runner_up(row.get("runner_up")) or not good:
            raise UserError(
                f"{path}:{number}: expected a prediction of faq/predict.sh, its question, runner_up and probabilities"
            )
        found.append(row)
    if not found:
        raise UserError(f"{path} is empty; expected predictions of faq/predict.sh")
    return found


def orders_of(rows: Sequence[dict[str, Any]], path: Path) -> int:
    """In how many orders of its candidates each question was asked. Raises UserError where some were in others."""
    found = [row.get("orders", 1) for row in rows]
    for number, orders in enumerate(found, 1):
        if type(orders) is not int or orders < 1:
            raise UserError(f"{path}:{number}: 'orders' is {files.shown(orders)}, expected a whole number from 1")
        if orders != found[0]:
            raise UserError(
                f"{path}:{number}: 'orders' is {orders}, and {found[0]} on line 1; a threshold holds for one of them: "
                "predict all questions anew with the same --orders"
            )
    return found[0]


def check_keepable(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Raise UserError where the model alone did not choose: a threshold is for probabilities of the same kind."""
    for number, row in enumerate(rows, 1):
        joined = "model_intent" in row
        if joined or not row.get("constrained", True):
            raise UserError(
                f"{path}:{number}: made with another --{'join_file' if joined else 'constrain'} than the threshold to "
                "keep is for: what the model alone says of its candidates; predict anew with --constrain true and "
                "--use_threshold false"
            )


def is_runner_up(value: Any) -> bool:
    """Whether a value names an intent with its probability, or is null."""
    named = isinstance(value, dict) and isinstance(value.get("intent"), str)
    return value is None or (named and isinstance(value.get("probability"), int | float))


def rates(hits: int, predicted_as: int, support: int) -> dict[str, float]:
    """Precision, recall and F1 of one intent against the rest; 0 where there is nothing to divide by.

    Of how many questions it is predicted and true, predicted, and true.
    """
    precision, recall = hits / predicted_as if predicted_as else 0.0, hits / support if support else 0.0
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    return {"precision": precision, "recall": recall, "f1": f1, "support": support}


def score(rows: Sequence[dict[str, Any]], none: str) -> dict[str, Any]:
    """All figures of one file; `rows` have intent, reference, and may have known and constrained."""
    pairs = [(row["reference"], row["intent"]) for row in rows]
    outside = sum(not row.get("known", True) for row in rows)
    right = sum(true == predicted for true, predicted in pairs)
    accuracy = right / len(pairs)
    judged = {true for true, _ in pairs} | {row["intent"] for row in rows if row.get("known", True)}
    hits = Counter(true for true, predicted in pairs if true == predicted)
    said, support = Counter(predicted for _, predicted in pairs), Counter(true for true, _ in pairs)
    by_intent = {intent: rates(hits[intent], said[intent], support[intent]) for intent in sorted(judged)}
    confused = Counter(pair for pair in pairs if pair[0] != pair[1])
    return {
        "constrained": all(row.get("constrained", True) for row in rows),
        "questions": len(pairs),
        "accuracy": round(accuracy, 4),
        "accuracy_standard_error": round(math.sqrt(accuracy * (1 - accuracy) / len(pairs)), 4),
        "accuracy_interval": interval(right, len(pairs)),
        "macro_f1": round(sum(found["f1"] for found in by_intent.values()) / len(by_intent), 4),
        "none_of_the_intents": {
            name: round(value, 4) for name, value in rates(hits[none], said[none], support[none]).items()
        },
        "outside_the_candidates": outside,
        "most_confused": [
            {"intent": true, "predicted": predicted, "count": count}
            for (true, predicted), count in confused.most_common(TOP_PAIRS)
        ],
        "per_intent": {
            intent: {"accuracy": round(found["recall"], 4), "questions": found["support"]}
            for intent, found in by_intent.items()
            if found["support"]
        },
    }


def interval(right: int, asked: int) -> list[float]:
    """[lowest, highest] accuracy that `right` of `asked` questions leave likely: 95%, Wilson's score interval."""
    from scipy.stats import binomtest

    found = binomtest(right, asked).proportion_ci(0.95, method="wilson")
    return [round(float(found.low), 4), round(float(found.high), 4)]


def say_few(result: dict[str, Any]) -> None:
    """Say that a test set is too small for its figure to mean much, where it is."""
    asked, found, (low, high) = (result[key] for key in ("questions", "accuracy", "accuracy_interval"))
    if high - low > WIDE:
        log(
            f"warning: {asked} test questions say little: an accuracy of {found:.0%} may as well be {low:.0%} or "
            f"{high:.0%} (95% interval); a hundred of other wordings say more (faq/prepare --test_data_file)"
        )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Score every file, draw the first one's confusions and coverage, compare; what is printed."""
    check(arguments)
    paths = [Path(name) for name in arguments.predictions]
    read = [read_predictions(path) for path in paths]
    if arguments.keep_threshold:
        check_keepable(read[0], paths[0])
    intents = Path(arguments.intents_file or paths[0].with_name(INTENTS_NAME))
    given = arguments.intents_file or arguments.train_file or arguments.keep_threshold or files.is_file(intents)
    catalog = load_catalog(intents) if given else None
    none = catalog.none if catalog else wording_of("auto").none
    results = [{"file": str(path)} | score(rows, none) for path, rows in zip(paths, read, strict=True)]
    say_few(results[0])
    picture = Path(arguments.picture) if arguments.picture else paths[0].with_suffix(".png")
    covered = picture.with_name(f"{picture.stem}_coverage.png")
    for path in (picture, covered):
        pictures.refuse_other(path)
    coverage.refuse_other(covered.with_suffix(".json"))
    found: dict[str, Any] = {"results": results}
    ways = {"model": read[0]} if all("probability" in row for row in read[0]) else {}
    suspects: list[dict[str, Any]] = []
    together: list[dict[str, Any]] = []
    if arguments.train_file and catalog:
        compared, more, suspects, together = compare(arguments, read[0], catalog)
        found |= compared
        ways |= more
    ways = {name: rows for name, rows in ways.items() if len(rows) >= FEWEST_JUDGED}
    wished = {"share": arguments.automate} if arguments.automate else {"precision": arguments.precision}
    kept: dict[str, Any] = {}
    if arguments.keep_threshold:  # that of both together is for the weights that are kept
        answers = ways | ({JOINED: together} if together else {})
        kept = decide(answers, none, wished, JOINED if arguments.join else "model")
    if kept and (orders := orders_of(read[0], paths[0])) > 1:
        kept["orders"] = orders
    if kept and arguments.join:  # decide() has refused predictions that cannot be joined
        kept |= found["joined"]["weights"] | {key: found["joined"][key] for key in ("inputs", "learned")}
    # all is read and computed; now the files
    if results[0]["most_confused"]:
        draw_confusions(read[0], results[0], picture)
        log(f"confusions drawn in {picture}")
    found["coverage"] = report_coverage(ways, none, wished, covered)
    if arguments.suspects_file:
        files.write_text(Path(arguments.suspects_file), "".join(json_text.dumps(row) + "\n" for row in suspects))
        log(f"{len(suspects)} training questions to look at in {arguments.suspects_file}")
    if kept and catalog:
        files.write_text(intents, replace(load_catalog(intents), decision=kept).to_json())
        log(
            f"{intents} keeps the threshold {kept['threshold']:.3f}: predict.sh answers less sure questions with {none}"
        )
    return found


def compare(
    arguments: argparse.Namespace, rows: list[dict[str, Any]], catalog: Catalog
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]], list[dict[str, Any]], list[dict[str, Any]]]:
    """(what the comparison adds to the JSON, other ways' rows under their names, training questions to look at, the
    answers of both together by the weights that are kept)."""
    from faq.advice import SHOWN, advise
    from faq.baselines import advice, compare, more_orders, say_leaks, untuned
    from llmops.embedding.folder import read_folder
    from llmops.intents.classifiers import Classifiers, read_asked
    from llmops.intents.retrieval import Features

    train = read_asked(Path(arguments.train_file), catalog)
    test = asked_of(rows, catalog, arguments.predictions[0])
    say_leaks(train, test)
    folder = read_folder(Path(arguments.embedding_model)) if arguments.embedding_model else None
    with stdout_to_stderr():
        classifiers = Classifiers(train, catalog, Features(folder))
        folds = classifiers.out_of_fold()
        baselines = compare(classifiers, folds, test)
    if arguments.untuned_file:
        baselines.append(untuned(unthresholded(read_predictions(Path(arguments.untuned_file))), rows))
    figures = []
    for baseline in baselines:
        found = score(baseline.rows, catalog.none)
        figures.append(
            {"name": baseline.name, "features": baseline.features}
            | {key: found[key] for key in FIGURES}
            | {"seconds_per_question": round(baseline.seconds / len(rows), 6) if baseline.seconds is not None else None}
        )
    best = max(range(len(baselines)), key=lambda k: figures[k]["accuracy"])
    linear = next((baseline for baseline in baselines if baseline.values is not None), None)
    ways = {linear.name: linear.rows} if linear else {}
    compared: dict[str, Any] = {"baselines": figures, "recommendation": ""}
    answers: list[dict[str, Any]] = []
    alone = [row for row in rows if "probability" in row and row.get("constrained", True) and "model_intent" not in row]
    if len(alone) == len(rows) and linear and linear.values is not None and len(rows) >= FEWEST_JUDGED:
        from faq.joined import join
        from llmops.intents.joined import NONE_OFFSET

        ways[JOINED], weights, answers = join(unthresholded(rows), linear.values, classifiers.classes, catalog.none)
        found = score(ways[JOINED], catalog.none)
        kept = {key: found[key] for key in FIGURES}
        compared["joined"] = {"weights": dict(zip(("model", "linear", NONE_OFFSET), weights, strict=True))} | kept
        compared["joined"] |= {"inputs": classifiers.width, "learned": classifiers.digest}
    said = unthresholded(rows)  # as the classifiers: no threshold for precision is theirs
    right = [row.get("model_intent", row["intent"]) == row["reference"] for row in said]
    both = said if all("model_intent" in row for row in rows) else ways.get(JOINED, [])
    together = [row["intent"] == row["reference"] for row in both]
    compared["recommendation"] = advice(right, baselines[best], figures[best], together)
    compared["to_try"] = more_orders(rows, right, baselines[best], together, catalog)
    for sentence in filter(None, (compared["recommendation"], compared["to_try"])):
        log(sentence)
    data = advise(classifiers, folds)
    suspects = data.pop("suspects")
    compared["training_data"] = data | {"suspects": len(suspects), "first_suspects": suspects[:SHOWN]}
    return compared, ways, suspects, answers


def asked_of(rows: Sequence[dict[str, Any]], catalog: Catalog, path: str) -> "list[Asked]":
    """What the predictions were asked; lists that the intents file lacks are added to the catalog. Raises UserError for
    lists that cannot be."""
    from llmops.intents.classifiers import Asked, check_variant

    kept, found = replace(catalog, lists=[*catalog.lists]), []
    for number, row in enumerate(rows, 1):
        asked = Asked(row.get("question", ""), row["reference"], row.get("variant"))
        check_variant(asked, kept, f"{path}:{number}")
        if "candidates" in row:
            listed = row["candidates"]
            known = isinstance(listed, list) and all(type(name) is str and name in catalog.intents for name in listed)
            if not known or not listed:
                raise UserError(
                    f"{path}:{number}: 'candidates' is {files.shown(listed)}, expected intents of the {INTENTS_NAME}; "
                    "give the file that was written for this model"
                )
            asked = replace(asked, variant=catalog.variant_of(listed))
        found.append(asked)
    return found


def unthresholded(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The predictions as they were before a kept threshold made some of them 不符合."""
    return [row | {"intent": row.pop("proposed", row["intent"])} for row in map(dict, rows)]


def report_coverage(
    ways: dict[str, list[dict[str, Any]]], none: str, wished: dict[str, float], path: Path
) -> dict[str, Any]:
    """Per way of answering its calibration and what can be automated; the curves in a picture and a JSON beside it."""
    if not ways:
        return {}
    curves = {name: coverage.curve(rows, none) for name, rows in ways.items()}
    coverage.draw(curves, wished, path)
    files.write_json(path.with_suffix(".json"), curves)
    log(f"coverage against accuracy drawn in {path}")
    return {
        name: coverage.calibration(rows, none) | {"wished": coverage.judge(rows, none, wished)}
        | {"at_precision": [coverage.judge(rows, none, {"precision": value}) for value in coverage.PRECISIONS]}
        | {"out_of_scope": coverage.out_of_scope(rows, none)}
        for name, rows in ways.items()
    }  # fmt: skip


def decide(ways: dict[str, list[dict[str, Any]]], none: str, wished: dict[str, float], way: str) -> dict[str, float]:
    """The calibration and the threshold of a way of answering that intents.json is to keep."""
    if way not in ways:
        raise UserError(f"a threshold needs at least {FEWEST_JUDGED} predictions with probabilities")
    kept = coverage.decision(ways[way], none, wished)
    if kept["threshold"] > 1:
        log("warning: no threshold makes these predictions right that often, so that none is automated; lower "
            "--precision, or pass --automate")  # fmt: skip
    return kept


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""

    def body() -> int:
        print_json(run(build_parser().parse_args(argv)))
        return 0

    return run_main(body)


if __name__ == "__main__":
    sys.exit(main())
