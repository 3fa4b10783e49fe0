"""The settings of `serve.py` in parts: who may come in, what a request may take, which model answers."""

import argparse
import ipaddress
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from llmops import files
from llmops.console import Parser, UserError, log, to_bool
from llmops.formats.families import families
from llmops.keyboard import instead
from llmops.machine import cpu_kernels
from llmops.models.checkpoints import Checkpoint

TOKEN = re.compile(r"[!-~]{8,200}")  # printable ASCII without blanks: what fits into a header and a cookie
SAFE_IN_COOKIE = re.compile(r'[^",;\\]*')
TOKEN_VARIABLE = "LLMOPS_TOKEN"


@dataclass(frozen=True)
class Access:
    """Who may come in. `token`: "" lets everybody in who reaches the address. `hosts`: names in the Host header.

    `token_place`: where the token is kept; "" for one that was made at this start and stands nowhere else.
    """

    host: str = "127.0.0.1"
    port: int = 5000
    token: str = ""
    hosts: tuple[str, ...] = ()
    body_bytes: int = 8 << 20
    seconds_to_send: float = 30.0
    connections: int = 1024
    token_place: str = ""


@dataclass(frozen=True)
class Limits:
    """What answers may take: `rows` at once, `queue` requests that wait, `seconds` and `tokens` of one answer.

    `prefix_bytes` is the memory for the keys and values of prompts that may come again.
    """

    rows: int = 64
    queue: int = 256
    tokens: int = 4096
    seconds: float = 600.0
    prefix_bytes: int = 1 << 30


@dataclass(frozen=True)
class Model:
    """Which model answers, and how it is opened."""

    folder: Path
    mode: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    base_too: bool = True
    intents_file: Path | None = None
    embedding_model: str = ""
    kernels: str = "auto"
    join_file: Path | None = None


@dataclass(frozen=True)
class Settings:
    """Everything that `serve.py` is told. `model` is None where only the console is served."""

    mount_path: Path
    access: Access = Access()
    limits: Limits = Limits()
    model: Model | None = None
    feedback_file: Path | None = None

    @property
    def feedback(self) -> Path:
        """Where corrections of intents are kept."""
        return self.feedback_file or self.mount_path / "datasets" / "feedback.jsonl"


def add_model_settings(parser: argparse.ArgumentParser) -> None:
    """How a model is opened."""
    add = parser.add_argument
    add("--mode", default="", choices=["", *families()], help="chat format; empty: as the model was trained, or auto")
    add("--dtype", default="auto", choices=["auto", "bf16", "fp16", "fp32"], help="auto: bf16 where the GPU has it")
    add("--cpu_kernels", default="auto", choices=cpu_kernels.SETTINGS, help=cpu_kernels.HELP)
    add("--trust_remote_code", type=to_bool, default=False, metavar="true|false",
        help="run Python code that the checkpoint's folder ships")  # fmt: skip
    add("--intents_file", default="", help="intents.json of faq/prepare; empty: the one in the model's folder")
    add("--embedding_model", default="", help="what finds candidates, if it was moved; with --join_file faq/score's")
    add("--join_file", default="", help="train.jsonl: the classifier of faq/score --join true answers with the model")


def build_parser() -> argparse.ArgumentParser:
    """Every setting with its default."""
    parser = Parser(prog="serve.py", description="Serve a model and the console.", allow_abbrev=False)
    add = parser.add_argument
    add("--mount_path", default="mnt", help="folder with datasets/ and output_path/, which the console shows")
    add("--model_name_or_path", default="", help="adapter, merged or whole model; empty or none: the console alone")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all")
    add("--port", type=int, default=5000, help="0: any that is free")
    add("--auth", type=to_bool, default=True, metavar="true|false", help="ask for the token")
    add("--token", default="", help=f"or {TOKEN_VARIABLE} in the environment; empty: a random one, which is printed")
    add("--token_file", default="", help="the file with the token; it is made where it is not there")
    add("--allowed_hosts", default="", help="names under which the server is reached, beside localhost: a,b")
    add("--max_body_mb", type=float, default=8, help="largest request")
    add("--max_connections", type=int, default=1024, help="connections at once")
    add("--max_rows", type=int, default=64, help="answers that are written at once")
    add("--max_queue", type=int, default=256, help="requests that wait for a place; more are refused with 429")
    add("--max_tokens", type=int, default=4096, help="longest answer that may be asked for")
    add("--request_seconds", type=float, default=600, help="longest time of a request")
    add(
        "--prefix_cache_mb",
        type=float,
        default=1024,
        help="memory for beginnings of prompts, of all models together; 0: none are kept",
    )
    add_model_settings(parser)
    add("--base_too", type=to_bool, default=True, metavar="true|false",
        help="beside an adapter its base model, as `base`; false: the adapter is merged, which is faster")  # fmt: skip
    add("--feedback_file", default="", help="corrections of intents; empty: datasets/feedback.jsonl in the mount")
    return parser


def read_settings(argv: list[str] | None = None) -> Settings:
    """The settings of a command line. Raises UserError for what cannot be."""
    given = build_parser().parse_args(argv)
    bounds = {
        "port": (0, 65535), "max_body_mb": (0.001, 1024), "max_connections": (1, 100_000), "max_rows": (1, 1024),
        "max_queue": (0, 100_000), "max_tokens": (1, 1_000_000), "request_seconds": (0.1, 86400),
        "prefix_cache_mb": (0, 10_000_000),
    }  # fmt: skip
    for name, (lowest, highest) in bounds.items():
        if not lowest <= getattr(given, name) <= highest:  # also for NaN
            raise UserError(f"--{name} is {getattr(given, name)}, expected {lowest} to {highest}")
    token, place = choose_token(given)
    access = Access(
        check_host(given.host), given.port, token, check_names(given.allowed_hosts), int(given.max_body_mb * 2**20),
        connections=given.max_connections, token_place=place,
    )  # fmt: skip
    limits = Limits(
        given.max_rows, given.max_queue, given.max_tokens, given.request_seconds, int(given.prefix_cache_mb * 2**20)
    )
    feedback = files.real(Path(given.feedback_file)) if given.feedback_file else None  # a link is not followed later
    mount = Path(given.mount_path)
    if os.path.exists(mount) and not files.is_folder(mount):
        raise UserError(f"--mount_path {mount} is a file, expected the folder with datasets/ and output_path/")
    return Settings(mount, access, limits, check_model(given), feedback)


def check_model(given: argparse.Namespace) -> Model | None:
    """The model's part. Raises UserError for folders that hold none."""
    if given.model_name_or_path in ("", "none"):
        for flag in ("intents_file", "join_file"):
            if getattr(given, flag):
                raise UserError(f"--{flag} needs a model that answers; pass --model_name_or_path")
        return None
    folder = Path(given.model_name_or_path)
    checkpoint = Checkpoint(folder)
    if not checkpoint.is_whole and not checkpoint.is_adapter:
        raise UserError(f"{folder} holds no model; expected the output_path of chat_main.sh or a checkpoint folder")
    intents = Path(given.intents_file) if given.intents_file else None
    if intents and not files.is_file(intents):
        raise UserError(f"--intents_file {intents} is not there; faq/prepare.sh writes it")
    join = Path(given.join_file) if given.join_file else None
    if join and not files.is_file(join):
        raise UserError(f"--join_file {join} is not there; expected the train.jsonl that the classifier learns from")
    return Model(
        folder, given.mode, given.dtype, given.trust_remote_code, given.base_too, intents, given.embedding_model,
        given.cpu_kernels, join,
    )  # fmt: skip


def check_host(host: str) -> str:
    """An address to listen on. Raises UserError for what is none."""
    if host == "localhost":
        return "127.0.0.1"
    try:
        return str(ipaddress.ip_address(host))
    except ValueError as error:
        raise UserError(f"--host is {files.shown(host)}, expected an address such as 127.0.0.1 or 0.0.0.0") from error


def check_names(text: str) -> tuple[str, ...]:
    """Names of hosts, separated by commas, in lower case."""
    names = tuple(name.strip().lower() for name in text.split(",") if name.strip())
    wrong = [name for name in names if not re.fullmatch(r"[a-z0-9_.-]+", name)]
    if wrong:
        raise UserError(
            f"--allowed_hosts has {files.shown(wrong[0])}, expected names such as models.example.org{instead(text)}"
        )
    return names


def choose_token(given: argparse.Namespace) -> tuple[str, str]:
    """(the token, where it is kept): given, from the file, from the environment, or a random one that is kept nowhere.

    The token is "" for --auth false.
    """
    from_environment = os.environ.get(TOKEN_VARIABLE, "")
    if not given.auth:
        if not ipaddress.ip_address(check_host(given.host)).is_loopback:
            raise UserError(f"--auth false with --host {given.host} would let everybody in; leave one of them out")
        return "", ""
    if given.token and given.token_file:
        raise UserError("give either --token or --token_file")
    where, token = "--token", given.token
    if given.token_file:
        where, token = given.token_file, token_of(Path(given.token_file))
    elif not token and from_environment:
        where, token = TOKEN_VARIABLE, from_environment
    elif not token:
        return secrets.token_urlsafe(24), ""
    if not TOKEN.fullmatch(token) or not SAFE_IN_COOKIE.fullmatch(token):
        raise UserError(
            f"the token of {where} cannot be used; expected 8 to 200 ASCII characters without blanks, quotes, commas, "
            "semicolons and backslashes"
        )
    return token, where


def token_of(path: Path) -> str:
    """The token in a file; where there is no file, one is made that its owner alone can read."""
    if not os.path.exists(path):
        token = secrets.token_urlsafe(24)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise UserError(
                f"--token_file {path} cannot be written ({error.strerror}); choose another place"
            ) from error
        with os.fdopen(descriptor, "w", encoding="ascii") as stream:
            stream.write(token + "\n")
        log(f"a new token is in {path}")
        return token
    return files.read_text(path, "the token file", limit=4096).strip()
