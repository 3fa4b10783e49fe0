"""Trainings that end in a known state, for bench/diagnosis.py: logs by our own training, truth measured beside.

A base model (2 layers) first learns small skills on letters (say again, capitals, first, last, backwards, next) and
some general conversations; one of the two bases knows a little about the library, too. Then it is fine-tuned on the
demo's library conversations, in most runs mixed with open questions whose answers are drawn at random: as in real
conversations there is a loss that nobody can train away. Each kind of run is made differently:
    healthy    enough data, a fitting learning rate, skills mixed in
    overfit    few topics and many epochs, evaluated on all topics
    low_rate   a healthy run with a learning rate that is 20 to 200 times too low
    few_steps  a healthy run that ends after 5 to 12 steps
    forgetting narrow data without any skills, with a learning rate that is several times too high
Beside log.txt, which the product writes, truth.jsonl holds the same evaluations on conversations that the log never
saw: other phrasings of the topics, other exercises of the skills.
"""

import json
import random
import shutil
import string
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmops.console import log
from llmops.models import tiny

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / "train" / "demo_data"
KINDS = ("healthy", "overfit", "low_rate", "few_steps", "forgetting")
SKILLS = {
    "再说一遍": lambda letters: letters,
    "换成大写": lambda letters: [letter.upper() for letter in letters],
    "倒着念": lambda letters: letters[::-1],
    "第一个是": lambda letters: letters[:1],
    "最后一个是": lambda letters: letters[-1:],
    "各往后数一个": lambda letters: [chr((ord(letter) - 97 + 1) % 26 + 97) for letter in letters],
}
BASES = {"fresh": 64, "informed": 48}  # name and width; `informed` saw one phrasing of every topic
BASE_STEPS = 1200
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Spec:
    """How one run is made; everything that differs between runs."""

    name: str
    kind: str
    base: str
    topics: int
    phrasings: int
    skills: int
    open: int
    test: int
    train_type: str
    learning_rate: float
    batch: int
    steps: int
    eval_steps: int
    logging_steps: int
    schedule: str
    seed: int


def specs(count: int) -> list[Spec]:
    """`count` runs of every kind; drawn from a seeded generator, so that every start has the same."""
    found = []
    for kind in KINDS:
        for i in range(count):
            draw = random.Random(f"{kind}-{i}")
            full = i % 3 != 2
            rate = draw.uniform(1.0e-3, 2.5e-3) if full else draw.uniform(4e-3, 8e-3)
            topics, phrasings, skills = 40, draw.randint(4, 6), draw.choice((600, 800, 1000))
            batch, steps = draw.choice((16, 24)), draw.randint(320, 420)
            open_questions, test = draw.choice((0, 300, 500, 700)), draw.randint(12, 40)
            if kind == "overfit":
                batch, open_questions = draw.choice((8, 12, 16)), draw.choice((0, 30, 60, 100))
                topics, phrasings, steps = draw.randint(6, 20), draw.randint(1, 4), draw.randint(320, 480)
                skills, rate = draw.choice((0, 60, 200)), rate * draw.uniform(1.2, 2)
            elif kind == "low_rate":
                rate /= draw.choice((20, 40, 80, 120, 200))
                steps = draw.randint(80, 300)
            elif kind == "few_steps":
                steps = draw.randint(5, 12)
            elif kind == "forgetting":
                rate *= draw.choice((2, 3, 4))
                topics, skills, steps, batch = draw.randint(8, 40), 0, draw.randint(80, 240), 12
            evals = draw.randint(6, 14) if kind != "few_steps" else draw.randint(2, 4)
            found.append(
                Spec(
                    f"{kind}-{i:02d}", kind, draw.choice(list(BASES)), topics, phrasings, skills, open_questions, test,
                    "all" if full else "lora", round(rate, 7), batch, steps, max(1, steps // evals),
                    draw.choice((1, 1, 2, 5)) if steps > 40 else 1, draw.choice(("cosine", "linear", "constant")),
                    1000 + i,
                )
            )  # fmt: skip
    return found


def exercise(draw: random.Random) -> Messages:
    """One exercise of a skill."""
    skill = draw.choice(list(SKILLS))
    letters = draw.sample(string.ascii_lowercase, draw.randint(2, 5))
    ask = f"{skill}：{' '.join(letters)}"
    return [{"role": "user", "content": ask}, {"role": "assistant", "content": " ".join(SKILLS[skill](letters))}]


def exercises(count: int, seed: str) -> list[Messages]:
    """Different exercises; a seed's are disjoint from every other seed's by the hash of the question."""
    draw = random.Random(seed)
    sets = ("base", "rehearsal", "retention", "truth")
    found: dict[str, Messages] = {}
    while len(found) < count:
        made = exercise(draw)
        ask = made[0]["content"]
        if random.Random(ask).randrange(len(sets)) == sets.index(seed.split("-", maxsplit=1)[0]):
            found[ask] = made
    return list(found.values())


def open_questions(count: int, seed: str) -> list[Messages]:
    """Questions that have no answer to be learned: some letters, the vowels more often."""
    draw = random.Random(f"open-{seed}")
    found = []
    for _ in range(count):
        letters = draw.choices("aeiou" * 3 + string.ascii_lowercase, k=draw.randint(3, 7))
        ask = f"第{draw.randrange(1000)}次，随便说几个字母"
        found.append([{"role": "user", "content": ask}, {"role": "assistant", "content": " ".join(letters)}])
    return found


def library() -> list[list[Messages]]:
    """The demo's single questions and answers by topic, nine phrasings each; the last one is for the base."""
    topics: dict[str, list[Messages]] = defaultdict(list)
    for name in ("train.jsonl", "test.jsonl"):
        for line in (DEMO / name).read_text(encoding="utf-8").splitlines():
            messages = json.loads(line)["messages"]
            if len(messages) == 2:
                topics[messages[1]["content"]].append(messages)
    return list(topics.values())


def write(path: Path, conversations: list[Messages]) -> Path:
    """Conversations as a jsonl file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in conversations]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_data(spec: Spec, folder: Path) -> None:
    """train, test (for the log) and truth of a run: other phrasings (`taught`: of topics in train), other exercises."""
    draw = random.Random(spec.seed)
    topics = library()
    draw.shuffle(topics)
    train, test, truth, taught = [], [], [], []
    for k, phrasings in enumerate(topics):
        phrasings.pop()
        draw.shuffle(phrasings)
        test.append(phrasings[0])
        truth.append(phrasings[1])
        if k < spec.topics:
            train += phrasings[2 : 2 + spec.phrasings]
            taught.append(phrasings[1])
    share = spec.open / (len(train) + spec.open)
    more = {name: open_questions(count, f"{name}-{spec.seed}") for name, count in (
        ("train", spec.open), ("test", round(spec.test * share)), ("truth", round(len(truth) * share)))}  # fmt: skip
    write(folder / "train.jsonl", train + more["train"] + exercises(spec.skills, f"rehearsal-{spec.seed}"))
    write(folder / "test.jsonl", draw.sample(test, spec.test) + more["test"])
    write(folder / "truth.jsonl", truth + more["truth"])
    write(folder / "taught.jsonl", taught)
    write(folder / "retention.jsonl", exercises(48, f"retention-{spec.seed}"))
    write(folder / "skills_truth.jsonl", exercises(96, f"truth-{spec.seed}"))


def make_base(folder: Path, name: str) -> None:
    """A tiny Llama that has learned the skills and general conversations, and if informed, something of the library."""
    import torch

    from llmops.models.chat_model import ChatModel
    from llmops.models.checkpoints import Checkpoint
    from train.batches import PaddedCollator, target_losses

    practice = exercises(6000, "base")
    general = (HERE.parent / "train" / "retention.jsonl").read_text(encoding="utf-8").splitlines()
    practice += [json.loads(line)["messages"] for line in general] * 10
    if name == "informed":
        practice += [topic[-1] for topic in library()] * 8
    texts = [m["content"] for messages in practice[:500] + practice[6000:] for m in messages]
    texts += [m["content"] for messages in open_questions(200, "base") for m in messages]
    texts += [m["content"] for topic in library() for messages in topic for m in messages]
    staging = folder.with_name(folder.name + ".part")
    tiny.write_checkpoint(staging, texts, vocab_size=600, hidden=BASES[name], layers=2, heads=4, seed=1)
    opened = ChatModel(Checkpoint(staging))
    chat, model = opened.chat, opened.weights(torch.float32)
    rendered = [chat.conversation(messages)[-1] for messages in practice]
    samples = [{"ids": torch.tensor(r.ids).numpy(), "learned": torch.tensor(r.learned).numpy()} for r in rendered]
    collate, draw = PaddedCollator(0), random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    for step in range(BASE_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 50) * (1 - step / BASE_STEPS)
        loss = target_losses(model, collate(draw.sample(samples, 48))).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.save_pretrained(staging)
    staging.rename(folder)
    log(f"base model {name}: loss {loss.item():.3f} on the skills")


def make_run(spec: Spec, work: Path) -> Path:
    """Train once through the product's own session; the folder with log.txt, truth.jsonl and spec.json."""
    folder = work / "runs" / spec.name
    if (folder / "spec.json").is_file():
        return folder
    base = work / f"base-{spec.base}"
    if not base.is_dir():
        make_base(base, spec.base)
    if folder.exists():
        shutil.rmtree(folder)
    write_data(spec, folder / "data")

    from train import session
    from train.config import Config

    config = Config(
        model_name_or_path=str(base), train_file=str(folder / "data" / "train.jsonl"), output_path=str(folder),
        test_file=str(folder / "data" / "test.jsonl"), retention_file=str(folder / "data" / "retention.jsonl"),
        train_type=spec.train_type, lora_dim=16, lora_alpha=32, lora_dropout=0.0,
        per_device_train_batch_size=spec.batch, gradient_accumulation_steps=1, per_device_eval_batch_size=32,
        max_seq_len=256, learning_rate=spec.learning_rate, max_steps=spec.steps, lr_scheduler_type=spec.schedule,
        warmup_ratio=0.05, eval_steps=spec.eval_steps, logging_steps=spec.logging_steps, tensorboard=False,
        gradient_checkpointing="false", dtype="fp32", seed=spec.seed,
    )  # fmt: skip
    data = session.prepare_data(config, encodes=True)
    trainer, schedule = session.build_trainer(config, data)
    trainer.add_callback(truth_callback(config, data, trainer, folder / "truth.jsonl"))
    schedule._evaluate_and_save = lambda state, control: evaluate_only(spec, schedule, state, control)
    session.train(config, trainer, schedule, 0)
    (folder / "spec.json").write_text(json.dumps(asdict(spec)), encoding="utf-8")
    for name in ("cache", "data", "tensorboard"):
        shutil.rmtree(folder / name)
    return folder


def evaluate_only(spec: Spec, schedule: Any, state: Any, control: Any) -> None:
    """Evaluation at its steps and at the end, and no checkpoints: they are not needed here."""
    due = state.global_step % spec.eval_steps == 0 or state.global_step >= spec.steps
    if due and schedule.evaluated != state.global_step:
        schedule.evaluated = state.global_step
        control.should_evaluate = True


def truth_callback(config: Any, data: Any, trainer: Any, path: Path) -> Any:
    """Writes, at every evaluation, what the log does not know."""
    from transformers import TrainerCallback

    from train.source import Source
    from train.token_cache import load_or_encode

    def load(name: str) -> Any:
        source = Source((Path(config.train_file).with_name(name),), Path(config.model_name_or_path), "auto", 256, False)
        return load_or_encode(source, data.model.chat, path.parent / "cache")

    questions, taught, skills = (load(name) for name in ("truth.jsonl", "taught.jsonl", "skills_truth.jsonl"))

    class Truth(TrainerCallback):
        """Loss on unseen phrasings, of all topics and of the taught ones, and on unseen exercises; known tokens."""

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            line = {
                "step": state.global_step,
                "loss": trainer.mean_loss(questions),
                "taught_loss": trainer.mean_loss(taught),
                "skill_loss": trainer.mean_loss(skills),
                "skill_known": share_known(trainer, skills),
            }
            with open(path, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")

    return Truth()


def share_known(trainer: Any, dataset: Any) -> float:
    """Share of the learned tokens that have a probability above one half, so that greedy decoding gives them."""
    import math

    import torch

    from train.batches import target_losses

    trainer.model_wrapped.eval()
    with torch.no_grad():
        losses = target_losses(trainer.model_wrapped, trainer.data_collator([dataset[i] for i in range(len(dataset))]))
    trainer.model_wrapped.train()
    return float((losses < math.log(2)).double().mean())
