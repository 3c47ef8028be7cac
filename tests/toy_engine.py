"""A second rollout engine, made only here: a server that speaks another dialect, its client, and its push of weights.

All that the package would need for it is a line in `config/engines.py`: see tests/e2e/test_another_engine.py.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import safetensors.torch
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from gspo_mm.config import Config
from gspo_mm.config.engines import Engine
from gspo_mm.data.pictures import measure
from gspo_mm.data.processor import Processor
from gspo_mm.families.folder import read_hf
from gspo_mm.policy.engine import Policy
from gspo_mm.rollout.engine import RolloutEngine
from gspo_mm.runtime.preempt import StopRequest
from gspo_mm.types import Completion, EncodedImage, EncodedPrompt, Finish, SamplingParams

TOY = Engine(rollout="tests.toy_engine:ToyOpening", sync="tests.toy_engine:ToyPush", serves=True)


# --- the server: POST /v1/completions, PUT /v1/weights/VERSION


class ToyServer(ThreadingHTTPServer):
    """Samples with transformers' own model, token by token and without a cache."""

    def __init__(self, config: Config, processor: Processor) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.paths: list[str] = []  # that were asked for
        self._processor = processor
        settings = AutoConfig.from_pretrained(config.model.path)
        with torch.random.fork_rng():
            model: Any = AutoModelForImageTextToText.from_config(settings, dtype=torch.float32)
        model.set_experts_implementation("eager")
        self._model = model.eval().requires_grad_(False)
        self._version = "none"
        self._random = torch.Generator().manual_seed(5)
        self._lock = threading.Lock()

    def take_weights(self, version: str, body: bytes) -> None:
        with self._lock:
            missing, unknown = self._model.load_state_dict(safetensors.torch.load(body), strict=False)
            assert not missing
            assert not unknown
            self._version = version

    def complete(self, asked: dict[str, Any]) -> dict[str, Any]:
        count, ids = asked["n"], asked["prompt_ids"]
        images = [self._processor.pixels(_image(data)) for data in asked["images"]]
        pixels = torch.cat([p for p, _ in images] * count) if images else None
        grids = torch.cat([g for _, g in images]) if images else None
        rows: list[list[int]] = [[] for _ in range(count)]
        logprobs: list[list[float]] = [[] for _ in range(count)]
        of_prompt: list[float] = []
        ended = [False] * count
        with self._lock:
            while len(rows[0]) < asked["max_tokens"] and not all(ended):
                tokens = torch.tensor([[*ids, *row] for row in rows])
                positions = self._processor.positions(tokens[0], grids)[:, None].expand(3, count, -1)
                all_grids = None if grids is None else grids.repeat(count, 1)
                logits = self._model(
                    input_ids=tokens, position_ids=positions, pixel_values=pixels, image_grid_thw=all_grids
                ).logits.log_softmax(-1)
                of_prompt = of_prompt or logits[0, :-1].gather(1, tokens[0, 1:, None]).squeeze(1).tolist()
                # never the token of an image, for which transformers would look for features
                last = logits[:, -1].clone()
                last[:, self._processor.image_token_id] = -torch.inf
                drawn = last.argmax(-1, keepdim=True)
                if not asked["greedy"]:
                    drawn = torch.multinomial(last.exp(), 1, generator=self._random)
                for number, token in enumerate(drawn.squeeze(1).tolist()):
                    rows[number].append(token)
                    logprobs[number].append(logits[number, -1, token].item())
                    ended[number] |= token in asked["stop"]
            choices = [self._choice(row, lp, asked["stop"]) for row, lp in zip(rows, logprobs, strict=True)]
            return {"model": f"toy@{self._version}", "choices": choices, "prompt_logprobs": of_prompt}

    @staticmethod
    def _choice(ids: list[int], logprobs: list[float], stops: list[int]) -> dict[str, Any]:
        end = next((place for place, token in enumerate(ids, 1) if token in stops), None)
        return {"ids": ids[:end], "logprobs": logprobs[:end], "why": "eos" if end else "max"}


class _Handler(BaseHTTPRequestHandler):
    server: ToyServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self) -> None:
        self._say(self.server.complete(json.loads(self._body())))

    def do_PUT(self) -> None:
        self.server.take_weights(self.path.rpartition("/")[2], self._body())
        self._say({})

    def _body(self) -> bytes:
        self.server.paths.append(f"{self.command} {self.path}")
        return self.rfile.read(int(self.headers["Content-Length"]))

    def _say(self, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _image(data: str) -> EncodedImage:
    content = base64.b64decode(data)
    width, height = measure(content)
    return EncodedImage(data=content, key=EncodedImage.key_of(content), width=width, height=height)


# --- what stands in rollout/


class ToyOpening:
    def __init__(self, config: Config, stop: StopRequest, *, main: bool) -> None:
        self._config, self._main = config, main

    def open(self, processor: Processor) -> RolloutEngine | None:
        return ToyEngine(ToyServer(self._config, processor), processor) if self._main else None

    def close(self, reason: str) -> None:
        pass


class ToyEngine:
    """A ServingEngine."""

    def __init__(self, server: ToyServer, processor: Processor) -> None:
        self.server = server
        self._processor = processor
        self._version = -1
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self._pool = ThreadPoolExecutor(4)

    @property
    def version(self) -> int:
        return self._version

    def start(
        self, prompt: EncodedPrompt, group_size: int, sampling: SamplingParams
    ) -> Future[list[Completion]]:
        return self._pool.submit(self._sample, prompt, group_size, sampling)

    def generate(
        self, prompts: list[EncodedPrompt], *, group_size: int, sampling: SamplingParams, seed: int
    ) -> list[list[Completion]]:
        return [self._sample(prompt, group_size, sampling) for prompt in prompts]

    def logprobs_of(self, prompt: EncodedPrompt, *, tokens: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        said = self._ask(prompt, 1, tokens, greedy=True)
        (choice,) = said["choices"]
        return tuple(choice["ids"]), (*said["prompt_logprobs"], *choice["logprobs"])

    def wants_weights(self) -> bool:
        return False

    def take_busy(self) -> float:
        return 1.0

    def take_counts(self) -> dict[str, float]:
        return {}

    def close(self, reason: str = "") -> None:
        self._pool.shutdown()
        self.server.shutdown()
        self.server.server_close()

    def take_weights(self, tensors: Iterator[tuple[str, torch.Tensor]], version: int) -> None:
        body = safetensors.torch.save({name: tensor.contiguous().clone() for name, tensor in tensors})
        httpx.put(f"{self.server.url}/v1/weights/{version}", content=body, timeout=60).raise_for_status()
        self._version = version

    def _sample(self, prompt: EncodedPrompt, count: int, sampling: SamplingParams) -> list[Completion]:
        said = self._ask(prompt, count, sampling.max_new_tokens, greedy=sampling.temperature == 0)
        version = int(said["model"].rpartition("@")[2])
        return [
            Completion.of_one_turn(
                token_ids=tuple(choice["ids"]),
                logprobs=tuple(choice["logprobs"]),
                versions=(version,) * len(choice["ids"]),
                finish=Finish.STOP if choice["why"] == "eos" else Finish.LENGTH,
                text=self._processor.decode(choice["ids"]),
            )
            for choice in said["choices"]
        ]

    def _ask(self, prompt: EncodedPrompt, count: int, tokens: int, *, greedy: bool) -> dict[str, Any]:
        asked = {
            "prompt_ids": list(prompt.token_ids),
            "images": [base64.b64encode(image.data).decode() for image in prompt.prompt.images],
            "stop": list(self._processor.stop_token_ids),
        }
        asked |= {"n": count, "max_tokens": tokens, "greedy": greedy}
        response = httpx.post(f"{self.server.url}/v1/completions", json=asked, timeout=60)
        return response.raise_for_status().json()


# --- what stands in sync/


class ToyPush:
    """A WeightPush: a file of all weights in one request."""

    def __init__(self, config: Config, policy: Policy, engine: RolloutEngine | None) -> None:
        assert engine is None or isinstance(engine, ToyEngine)
        self._policy, self._engine = policy, engine

    def push(self, *, version: int) -> None:
        def take(tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
            assert self._engine
            self._engine.take_weights(tensors, version)

        self._policy.ranks.stream_to_main(self._policy.export(), take)

    def make_room(self) -> None:
        pass

    def close(self) -> None:
        pass

    @staticmethod
    def serve_folder(config: Config, engine: RolloutEngine) -> None:
        assert isinstance(engine, ToyEngine)
        engine.take_weights(iter(read_hf(config.model.path, config.model.experts_layout)), 0)
