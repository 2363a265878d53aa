"""`prx-post reward-serve`: scores images over HTTP for runs on other GPUs and machines. docs/reward-server.md."""

import ipaddress
import logging
import math
import os
import re
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from prx_post.base.errors import ConfigError, PrxPostError
from prx_post.base.net import is_loopback, resolve
from prx_post.base.parsing import parse
from prx_post.base.settings import check_fields, doc, require, require_installed, require_one_of
from prx_post.rewards.registry import REGISTRY, RewardSpec, parse_specs
from prx_post.rewards.reward import Reward, WeightedSum, checked
from prx_post.rewards.service.batching import Scorer
from prx_post.rewards.service.protocol import TOKEN_VARIABLE

SUM = "sum"
"""The name under which the weighted sum is served."""
MIN_TOKEN_CHARACTERS = 16
KEEP_ALIVE_S = 75
"""How long a connection may be idle; longer than most training steps, so that clients keep theirs."""
BACKLOG = 1024
"""Connections that may wait to be accepted."""
TRIAL_PROMPT = 'a sign that says "0"'
"""A prompt that every reward of REGISTRY can score."""


@dataclass
class RewardServeConfig:
    """A server that scores images over HTTP."""

    rewards: list[str] = doc(
        "Rewards to serve: names, name=weights, or path/to/module.py:function; separated by spaces or commas.", []
    )
    reward_weights: list[float] | None = doc("One per reward; adds their weighted sum under the name sum.", None)
    host: str = doc("Address to listen on; anything but this machine's loopback needs a token.", "127.0.0.1")
    port: int = doc("Port to listen on; 0 takes a free one, which is printed.", 8000)
    token_file: str | None = doc(
        "File with the token that clients must send; null: the environment's PRX_POST_REWARD_TOKEN, or none.", None
    )
    device: str | None = doc(
        "Device of rewards that run a model: cpu, cuda, cuda:1; null: a GPU if there is one.", None
    )
    dtype: str = doc("Precision of rewards that run a model: float32 or bfloat16.", "float32")
    batch_size: int = doc("Images scored together, of one request or of several.", 16, above=0)
    max_batch_wait_ms: float = doc(
        "How long an image may wait for others to share its batch, milliseconds.", 10.0, at_least=0
    )
    max_request_mib: int = doc("Largest body of a request, MiB.", 32, above=0)
    max_pixels: int = doc("Largest image, width times height.", 2048 * 2048, above=0)
    max_images: int = doc("Most images of one request.", 256, above=0)
    max_queued_images: int = doc(
        "Images accepted and not scored yet; beyond that, clients are told to wait.", 512, above=0
    )
    max_requests: int = doc(
        "Requests received or scored at a time; beyond that, clients are told to wait.", 32, above=0
    )
    num_threads: int = doc("CPU threads torch may use; 0 leaves torch's own choice.", 0, at_least=0)

    def __post_init__(self) -> None:
        given = [self.rewards] if isinstance(self.rewards, str) else self.rewards
        if isinstance(given, list) and all(isinstance(text, str) for text in given):
            self.rewards = [part.strip() for text in given for part in text.split(",") if part.strip()]
        if isinstance(self.reward_weights, list):  # YAML's whole numbers
            self.reward_weights = [float(w) if type(w) is int else w for w in self.reward_weights]
        check_fields(self)
        require(bool(self.rewards), "rewards", self.rewards, "set", "there is nothing to serve", "Set rewards")
        self._check_names()
        require(0 <= self.port < 2**16, "port", self.port, "0 to 65535", "ports are these", "Correct it")
        require_one_of("dtype", self.dtype, ("float32", "bfloat16"))
        finite, reason = math.isfinite(self.max_batch_wait_ms), "a batch that is never full would never be scored"
        require(finite, "max_batch_wait_ms", self.max_batch_wait_ms, "finite", reason, "Set it to 10, for instance")
        rule = f"at least max_images ({self.max_images})"
        reason, action = "a request of that many would never be accepted", "Raise it, or lower max_images"
        fits = self.max_queued_images >= self.max_images
        require(fits, "max_queued_images", self.max_queued_images, rule, reason, action)
        self._check_device()

    def _check_names(self) -> None:
        labels = [spec.label for spec in parse_specs(self.rewards)]
        for label in labels:
            rule, reason = "letters, digits, _ and -", "it is part of a URL"
            valid = re.fullmatch(r"[A-Za-z_][\w-]*", label, re.ASCII) is not None
            require(valid, "rewards", label, rule, reason, "Write label=... before it")
        if self.reward_weights is None:
            return
        count, reason = len(labels), "each reward has one"
        fits = len(self.reward_weights) == count
        rule, action = f"{count} numbers", "Give as many weights as rewards"
        require(fits, "reward_weights", self.reward_weights, rule, reason, action)
        reason, action = f"{SUM} is the weighted sum", "Write another label=... before that reward"
        require(SUM not in labels, "rewards", self.rewards, f"without one named {SUM}", reason, action)

    def _check_device(self) -> None:
        if self.device is None:
            return
        try:
            kind = torch.device(self.device).type
        except RuntimeError as error:
            action = "Write cpu, cuda or cuda:1"
            raise ConfigError(f"device is {self.device!r}, which torch does not know. {action}.") from error
        usable = kind != "cuda" or torch.cuda.is_available()
        require(usable, "device", self.device, "cpu", "torch finds no GPU here", "Leave device out")


def read_token(config: RewardServeConfig) -> str | None:
    """The token of the file, or of the environment; None without either. It is never part of a message.

    Raises:
        PrxPostError: the file cannot be read, or what it holds is no token, or easily guessed.
    """
    where, token = TOKEN_VARIABLE, os.environ.get(TOKEN_VARIABLE)
    if config.token_file is not None:
        where = config.token_file
        try:
            token = Path(where).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise PrxPostError(f"token_file is {where!r}, which cannot be read: {reason}. Check the path.") from error
    if token is not None and not re.fullmatch(rf"[!-~]{{{MIN_TOKEN_CHARACTERS},}}", token):
        raise PrxPostError(
            f"the token of {where} must have at least {MIN_TOKEN_CHARACTERS} characters, ASCII and without spaces, "
            f"because a shorter one can be guessed. Make one: openssl rand -hex 32."
        )
    return token


def bind(config: RewardServeConfig, has_token: bool) -> socket.socket:
    """The server's socket. It has its port, so that a port which is taken is known now, but does not listen yet.

    Raises:
        PrxPostError: the address is not this machine's or is taken, or others could reach it without a token.
    """
    host, port = config.host, config.port
    try:
        address = resolve(host, port)[0]
        is_private = is_loopback(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PrxPostError(f"host is {host!r}, which cannot be resolved: {reason}. Correct it.") from error
    if not (is_private or has_token):
        raise PrxPostError(
            f"host is {host!r}, but must be a loopback address such as 127.0.0.1 without a token, because anyone who "
            f"reaches the port could use this machine. Set token_file or {TOKEN_VARIABLE}."
        )
    family = socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
    except OSError as error:
        listener.close()
        raise _cannot_listen(host, port, error) from error
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> PrxPostError:
    return PrxPostError(f"cannot listen on {host} port {port}: {error.strerror}. Choose another host or port.")


def load_rewards(config: RewardServeConfig) -> dict[str, Reward]:
    """The rewards by name, each ready to score: those of REGISTRY have scored a blank image, which loads the model.

    Raises:
        PrxPostError: something that one needs is not there.
    """
    rewards: dict[str, Reward] = {}
    for spec in parse_specs(config.rewards):
        rewards[spec.label] = _load(spec, config)
    if config.reward_weights is not None:
        rewards[SUM] = WeightedSum(dict(rewards), config.reward_weights)
    return rewards


def _load(spec: RewardSpec, config: RewardServeConfig) -> Reward:
    reward = spec.load(device=config.device, dtype=config.dtype, batch_size=config.batch_size)
    if spec.target in REGISTRY:
        checked(reward([Image.new("RGB", (64, 64), "white")], [TRIAL_PROMPT]), spec.label, 1)
    return reward


def make_server(config: RewardServeConfig, rewards: Mapping[str, Reward], token: str | None) -> tuple[Any, Scorer]:
    """A uvicorn server, which answers once it is run, and the thread that scores for it; close that one last."""
    import uvicorn

    from prx_post.rewards.service.metrics import Metrics
    from prx_post.rewards.service.serving import Limits, Service, create_app

    metrics = Metrics()
    limits = Limits(
        max_request_bytes=config.max_request_mib * 2**20,
        max_pixels=config.max_pixels,
        max_images=config.max_images,
        max_queued_images=config.max_queued_images,
        max_requests=config.max_requests,
    )
    wait_s = config.max_batch_wait_ms / 1000
    scorer = Scorer(rewards, batch_size=config.batch_size, max_wait_s=wait_s, observe=metrics.observe_batch)
    identities = {name: reward.identity for name, reward in rewards.items()}
    options = uvicorn.Config(
        create_app(Service(identities, scorer, limits, token, metrics), metrics),
        http="h11",  # what was tested, whatever else is installed
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
    )
    return uvicorn.Server(options), scorer


def serve(config: RewardServeConfig, listener: socket.socket, rewards: dict[str, Reward], token: str | None) -> None:
    """Answer until SIGTERM or SIGINT, then finish what was accepted."""
    server, scorer = make_server(config, rewards, token)
    _stop_cleanly(server)
    try:
        listener.listen(BACKLOG)
    except OSError as error:  # two servers had bound the port, and the other one was faster
        raise _cannot_listen(config.host, config.port, error) from error
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {', '.join(rewards)} on http://{shown}:{port}", flush=True)
    server.run(sockets=[listener])
    if not server.force_exit:  # as a second Ctrl+C does
        scorer.close()


def _stop_cleanly(server: Any) -> None:
    """Uvicorn raises the signal that stopped it again when it is done, which would end the process by that signal."""

    def stop(*_: object) -> None:
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def run(args: Sequence[str]) -> None:
    """`prx-post reward-serve`"""
    (config,) = parse([RewardServeConfig], args, "prx-post reward-serve")
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        require_installed(module, "the reward server", "serve")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    token = read_token(config)
    listener = bind(config, token is not None)
    with listener:
        serve(config, listener, load_rewards(config), token)
