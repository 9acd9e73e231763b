"""Time of sampling codes, against `transformers.generate` on the same prior:
`python -m benchmarks.sampling [--threads 2] [--rounds 5] [--batches 1 8 64] [--lengths 16 64 256] [--compiled]`.

Priors are the presets' with fresh weights. `generate` has its dynamic cache (as shipped), or its static one; with
guidance it gets the null token as negative prompt, without which it would guide by the class itself. `--compiled` adds
what torch.compile makes of both: the product's step, and the forward of `generate` with a static cache.

The product's sampler is kept from call to call, as `VQGANPipeline` keeps it; `first_ms` is its first call, which
records the step. Before anything is timed the lanes' greedy codes are compared, with guidance or without. Then all of
them sample at temperature 1, which is what an image needs. `outside` is the share of the product's time that is not
spent in the model's forward, and `numbers`, `choice` what of it the random numbers take, and guidance, filter and
pick. `--flips 256` counts images whose codes depend on the batch they were sampled in.

On a GPU: `--device cuda --dtype bfloat16 --priors 111m 343m --batches 64 256 --lengths 256 --guidance 2 --compiled
--without "generate, static" "generate, static, compiled"`. Greedy codes are then compared for the share that agrees,
because bfloat16 flips near-ties. `images / s` has the share of the floor beside it: what reading every matrix once a
token (or multiplying by it, if that takes longer) and every key and value that is there would take at the rates of
copies and matrix products measured on the same machine.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.measuring import environment, interleaved, machine_speed, ratio, summary, table, write
from configs import load_config
from stage2_prior import Stage2Config, TokenLayout
from stage2_prior.prior import build_prior
from stage2_prior.sampling import CodeSampler
from stage2_prior.sampling_memory import bytes_per_token
from stage2_prior.sampling_options import SamplingOptions
from stage2_prior.throughput import matmul_rate, synchronize


def llama(layers: int, width: int, heads: int, intermediate: int) -> dict[str, Any]:
    """Settings of a Llama whose heads all have keys and values of their own."""
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    return {"model_type": "llama", **sizes, "intermediate_size": intermediate}


# Preset or settings of the model, and its codebook size.
PRIORS: dict[str, tuple[str | dict[str, Any], int]] = {
    "digits": ("digits/stage2", 256),
    "fashion_mnist": ("fashion_mnist/stage2", 512),
    "111m": (llama(12, 768, 12, 2048), 16384),
    "343m": (llama(24, 1024, 16, 2816), 16384),
}
GUIDANCE = 2.0


def make_prior(name: str, length: int, device: str, dtype: torch.dtype) -> tuple[PreTrainedModel, TokenLayout]:
    """A prior with fresh weights, spread so that its logits differ as those of a trained one."""
    model, num_codes = PRIORS[name]
    classes = tuple(str(number) for number in range(10))
    layout = TokenLayout(num_codes, classes, (length // 8, 8), 4, "")
    torch.manual_seed(0)
    settings = load_config(Stage2Config, model).model if isinstance(model, str) else model
    prior = build_prior({**settings, "initializer_range": 0.06}, layout).eval()
    return prior.to(device, dtype), layout  # type: ignore[arg-type]


def copy_rate(device: torch.device) -> float:
    """Bytes per second, read and written, of large copies: the best of a few."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(6):
        synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        times.append(time.perf_counter() - started)
    return 2 * source.nbytes / min(times)


def floor_seconds(prior: PreTrainedModel, layout: TokenLayout, batch: int, guidance: float) -> float:
    """Least time of a batch: matrices read or multiplied by, and keys and values that are there read, once a token."""
    rows = batch * (1 if guidance == 1 else 2)
    table, head = prior.get_input_embeddings().weight, prior.get_output_embeddings().weight
    matrices = sum(w.numel() for w in prior.parameters() if w.ndim == 2 and (w is not table or table is head))
    copies, products = copy_rate(prior.device), matmul_rate(prior.device, prior.dtype)
    positions = sum(range(1, layout.length + 1))
    stored = positions * rows * bytes_per_token(prior) / copies
    return stored + layout.length * max(matrices * prior.dtype.itemsize / copies, 2 * rows * matrices / products)


def prompts_of(layout: TokenLayout, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Classes in turn, and the null token."""
    prompts = layout.class_tokens(torch.arange(batch) % layout.num_classes)[:, None].to(device)
    return prompts, torch.full_like(prompts, layout.null_token)


def make_lanes(
    prior: PreTrainedModel, layout: TokenLayout, batch: int, guidance: float, greedy: bool, compiled: bool = False
) -> dict[str, Callable[[], Tensor]]:
    """Functions that return int64 codes `(batch, L)` when the device has them."""
    prompts, nulls = prompts_of(layout, batch, prior.device)
    options = SamplingOptions(guidance_scale=guidance, temperature=0.0 if greedy else 1.0)
    seeds = torch.arange(batch, device=prior.device)

    def tessella(compile_step: bool) -> Callable[[], Tensor]:
        sampler = CodeSampler(prior, batch, 1, layout.length, layout.num_codes, options, compile_step)
        return lambda: sampler.sample(prompts, nulls, seeds)

    def generate(**cache: Any) -> Callable[[], Tensor]:
        settings: dict[str, Any] = {"do_sample": not greedy, **cache}
        if guidance != 1:
            settings |= {"guidance_scale": guidance, "negative_prompt_ids": nulls,
                         "negative_prompt_attention_mask": torch.ones_like(nulls)}  # fmt: skip
        mask = torch.ones_like(prompts)
        return lambda: prior.generate(prompts, attention_mask=mask, **settings)[:, 1:]  # type: ignore[operator]

    lanes = {
        "tessella": tessella(False),
        "generate, dynamic": generate(),
        "generate, static": generate(cache_implementation="static"),
    }
    if compiled:
        plain = generate(cache_implementation="static")
        compiled_forward = torch.compile(prior.forward)

        def generate_compiled() -> Tensor:
            eager, prior.forward = prior.forward, compiled_forward  # type: ignore[method-assign]
            try:
                return plain()
            finally:
                prior.forward = eager  # type: ignore[method-assign]

        lanes |= {"tessella, compiled": tessella(True), "generate, static, compiled": generate_compiled}

    def finished(lane: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            codes = lane()
            synchronize(prior.device)
            return codes

        return run

    return {name: finished(lane) for name, lane in lanes.items()}


def flips(name: str, length: int, guidance: float, images: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """How many images are not, code by code, those of batches of 64 when they are sampled in others."""
    prior, layout = make_prior(name, length, device, dtype)
    prompts, nulls = prompts_of(layout, images, prior.device)

    def sampled(size: int) -> Tensor:
        options = SamplingOptions(guidance_scale=guidance)
        sampler = CodeSampler(prior, size, 1, layout.length, layout.num_codes, options)
        starts = [min(start, images - size) for start in range(0, images, size)]
        codes = torch.empty(images, layout.length, dtype=torch.int64, device=prior.device)
        seeds = torch.arange(images, device=prior.device)
        for start in starts:
            rows = slice(start, start + size)
            codes[rows] = sampler.sample(prompts[rows], nulls[rows], seeds[rows])
        return codes

    expected = sampled(64)
    different = {f"batch {size}": int((sampled(size) != expected).any(1).sum()) for size in (7, 1)}
    return {"prior": name, "codes": length, "guidance": guidance, "images": images, **different}


def shares(prior: PreTrainedModel, layout: TokenLayout, batch: int, guidance: float) -> dict[str, float]:
    """Of the product's time: outside the forward; random numbers; guidance, filter and pick. Unknown on a GPU, where
    the host only starts a recording."""
    if prior.device.type != "cpu":
        return {}
    sampler = CodeSampler(prior, batch, 1, layout.length, layout.num_codes, SamplingOptions(guidance_scale=guidance))
    prompts, nulls = prompts_of(layout, batch, prior.device)
    sampler.sample(prompts, nulls, torch.arange(batch))  # records the step
    spent = dict.fromkeys(("forward", "race", "choose"), 0.0)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            spent[name] += time.perf_counter() - started
            return result

        return call

    sampler.decode_one = timed("forward", sampler.decode_one)  # type: ignore[method-assign]
    sampler.read = timed("forward", sampler.read)  # type: ignore[method-assign]
    sampler.race = timed("race", sampler.race)  # type: ignore[method-assign]
    sampler.choose = timed("choose", sampler.choose)  # type: ignore[method-assign]
    started = time.perf_counter()
    sampler.sample(prompts, nulls, torch.arange(batch))
    total = time.perf_counter() - started
    return {
        "outside": round(1 - spent["forward"] / total, 3),
        "numbers": round(spent["race"] / total, 3),
        "choice": round(spent["choose"] / total, 3),
    }


def measure(
    name: str,
    length: int,
    batch: int,
    guidance: float,
    rounds: int,
    compiled: bool,
    without: list[str],
    device: str,
    dtype: torch.dtype,
) -> list[dict[str, Any]]:
    """Lines of the table: every lane at one setting, but those left out.

    Raises:
        AssertionError: a lane chooses other greedy codes, in float32.
    """
    prior, layout = make_prior(name, length, device, dtype)
    greedy_lanes = make_lanes(prior, layout, batch, guidance, greedy=True)
    greedy = {lane: run() for lane, run in greedy_lanes.items() if lane not in without}
    agree = {lane: (codes == greedy["tessella"]).float().mean().item() for lane, codes in greedy.items()}
    assert dtype != torch.float32 or set(agree.values()) == {1.0}, (name, length, batch, guidance, agree)
    lanes = make_lanes(prior, layout, batch, guidance, False, compiled)
    lanes = {lane: run for lane, run in lanes.items() if lane not in without}
    started = time.perf_counter()
    lanes["tessella"]()
    first = 1e3 * (time.perf_counter() - started)
    times = interleaved(lanes, rounds)
    parts = shares(prior, layout, batch, guidance)
    floor = floor_seconds(prior, layout, batch, guidance)
    return [
        {
            "prior": name,
            "codes": length,
            "batch": batch,
            "guidance": guidance,
            "lane": lane,
            **summary(values),
            "images / s": round(batch / statistics.median(values.wall), 1),
            "of floor": round(floor / statistics.median(values.wall), 3),
            "greedy codes": round(agree.get(lane, math.nan), 3),
            "time / tessella": ratio(values, times["tessella"]),
            "first_ms": round(first) if lane == "tessella" else "",
            **(parts if lane == "tessella" else dict.fromkeys(parts, "")),
        }
        for lane, values in times.items()
    ]


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """A line as it is printed."""
    compared = row["time / tessella"]
    return {
        **row,
        "time / tessella": "{median} ({p10}–{p90})".format(**compared),
        "by CPU": compared["by_cpu"],
        "contaminated": "yes" if row["contaminated"] else "",
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--priors", nargs="+", choices=list(PRIORS), default=["digits", "fashion_mnist"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, GUIDANCE])
    parser.add_argument("--flips", type=int, default=0, help="images to sample at batch 64, 7 and 1, and compare")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--without", nargs="+", default=[], help="lanes to leave out")
    parser.add_argument("--output", default="runs/benchmarks/sampling.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    where, speed = environment(), machine_speed()
    place = args.device, getattr(torch, args.dtype)
    flipped = []
    if args.flips:
        flipped = [flips(n, c, g, args.flips, *place) for n in args.priors for c in args.lengths for g in args.guidance]
        print("images that are not, code by code, those of batches of 64:")
        print(table(flipped))
    settings = [(n, c, b, g) for n in args.priors for c in args.lengths for b in args.batches for g in args.guidance]
    rows = []
    for setting in settings:
        measured = measure(*setting, args.rounds, args.compiled, args.without, *place)
        print(table([shown(row) for row in measured]), flush=True)
        rows += measured
    write(
        args.output, {"environment": where, "threads": args.threads, "machine": speed, "flips": flipped, "rows": rows}
    )


if __name__ == "__main__":
    main()
