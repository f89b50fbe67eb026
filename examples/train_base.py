"""Train the examples' base model from scratch: a Llama of 4.2 million parameters on GSM8K's text.

No model hub is needed to try this project, so it brings a model of its own. The model writes text that looks like
GSM8K and calculates nothing correctly; it is there to be served and finetuned, not to be right.

    python examples/train_base.py --out base-model

Ctrl-C ends the training early and writes what there is; a second Ctrl-C leaves without writing.
"""

import argparse
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from base_folder import PAD, SPECIAL_TOKENS, document, model_config, train_tokenizer, write_folder
from gsm8k import DataError, Problem, load_split
from packing import IGNORED, Rows, pack
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

ROW_TOKENS = 384
BATCH_ROWS = 12  # 4,608 tokens
WARMUP_STEPS = 40
MATRIX_RATE = 0.02  # Muon
OTHER_RATE = 6e-3  # AdamW: embeddings and norms
REPORT_SECONDS = 15.0


def rate_factor(step: int, progress: float) -> float:
    """Warm up over 40 steps, hold, fall to zero over the last half; `progress` runs from 0 to 1."""
    return min((step + 1) / WARMUP_STEPS, 1.0) * min(2.0 * (1.0 - progress), 1.0)


def packed(problems: tuple[Problem, ...], tokenizer: Tokenizer) -> Rows:
    """The problems as packed rows; the few documents longer than a row are left out and counted."""
    texts = [document(problem.question, problem.worked) for problem in problems]
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    fitting = [ids for ids in encoded if len(ids) <= ROW_TOKENS]
    rows = pack(fitting, ROW_TOKENS, SPECIAL_TOKENS.index(PAD))
    kept = sum(map(len, fitting))
    print(
        f"{len(fitting)} documents, {kept} tokens in {len(rows.tokens)} rows of {ROW_TOKENS} "
        f"({kept / rows.tokens.numel():.1%} full), {len(encoded) - len(fitting)} too long"
    )
    return rows


def loss_function(model: LlamaForCausalLM, compiled: bool, mixed: bool = True) -> Callable[[Rows], Tensor]:
    """A function from rows to their next-token loss in nats, summed over all labels; gradients flow through it.

    `mixed`: products in bfloat16, else all in float32.
    """

    def summed(tokens: Tensor, positions: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            logits = model(input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False).logits
        return functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )

    run = torch.compile(summed) if compiled else summed
    return lambda rows: run(rows.tokens, rows.positions, rows.mask(), rows.labels)


@torch.no_grad()
def evaluate(loss_of: Callable[[Rows], Tensor], rows: Rows) -> float:
    """Mean loss over all labels, nats/token."""
    parts = torch.arange(len(rows.tokens)).split(BATCH_ROWS)
    total = sum(loss_of(rows.take(part)).item() for part in parts)
    return total / int((rows.labels != IGNORED).sum())


def batches(rows: Rows, steps: int, generator: torch.Generator) -> Iterator[Rows]:
    """Batches of rows in a new order each epoch; an incomplete batch at an epoch's end is left out."""
    per_epoch = len(rows.tokens) // BATCH_ROWS
    for start in range(0, steps, per_epoch):
        order = torch.randperm(len(rows.tokens), generator=generator)
        for part in order[: per_epoch * BATCH_ROWS].split(BATCH_ROWS)[: steps - start]:
            yield rows.take(part)


class Optimizers:
    """Muon (Jordan et al. 2024) for the weight matrices, AdamW for the embedding and the norms."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        named = dict(model.named_parameters())
        matrices = [value for name, value in named.items() if value.ndim == 2 and "embed_tokens" not in name]
        others = [value for name, value in named.items() if value.ndim != 2 or "embed_tokens" in name]
        self._rates = (MATRIX_RATE, OTHER_RATE)
        self._optimizers = (
            torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.0),
            torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0),
        )

    def step(self, factor: float) -> None:
        """One step at `factor` times the peak rates; gradients are cleared."""
        for optimizer, rate in zip(self._optimizers, self._rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad()


def train(model: LlamaForCausalLM, loss_of: Callable[[Rows], Tensor], rows: Rows, args: argparse.Namespace) -> int:
    """Train until the epochs or the minutes are used up, or Ctrl-C; returns the tokens seen."""
    stopped: list[int] = []

    def stop(number: int, _frame: object) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(number)

    previous = signal.signal(signal.SIGINT, stop)
    optimizers = Optimizers(model)
    total = max(1, round(args.epochs * (len(rows.tokens) // BATCH_ROWS)))
    limit_s = args.max_minutes * 60.0
    started = reported = first_done = time.monotonic()
    losses: list[float] = []
    seen = 0
    for step, batch in enumerate(batches(rows, total, torch.Generator().manual_seed(args.seed))):
        elapsed = time.monotonic() - started
        progress = max(step / total, elapsed / limit_s)
        if progress >= 1.0 or stopped:
            break
        count = int((batch.labels != IGNORED).sum())
        loss = loss_of(batch) / count
        loss.backward()
        optimizers.step(rate_factor(step, progress))
        losses.append(loss.item())
        seen += int((batch.document >= 0).sum())
        now = time.monotonic()
        if step == 0:
            first_done = now  # the first step compiles: it says nothing about the others
        elif now - reported > REPORT_SECONDS or step == total - 1:
            reported = now
            left_s = min((now - first_done) / step * (total - step - 1), limit_s - (now - started))
            recent = sum(losses[-20:]) / len(losses[-20:])
            print(
                f"step {step + 1}/{total}  loss {recent:.3f}  {seen / 1e6:.2f} M tokens  "
                f"{seen / (now - started):.0f} tokens/s  ETA {left_s / 60:.1f} min",
                flush=True,
            )
    signal.signal(signal.SIGINT, previous)
    if stopped:
        print("stopped early; writing what there is")
    return seen


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the Hugging Face folder: bf16 weights without the output layer, which is the embedding."""
    folder.mkdir(parents=True, exist_ok=True)
    write_folder(folder, tokenizer)
    weights = {
        name: value.to(torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }
    path = folder / "model.safetensors"
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)  # the library leaves it readable by its owner alone


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the examples' base model from scratch on the CPU.")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write; must hold no model")
    parser.add_argument("--epochs", type=float, default=4.0, help="passes over the 6,500 documents (default 4)")
    parser.add_argument(
        "--max-minutes",
        type=float,
        default=math.inf,
        help="end after so many minutes; the learning rate then follows the clock, and the seed alone no longer "
        "fixes the result",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument(
        "--no-compile", action="store_true", help="do without torch.compile, which needs a C++ compiler"
    )
    args = parser.parse_args()
    if args.epochs <= 0 or args.max_minutes <= 0 or args.threads <= 0:
        parser.error("--epochs, --max-minutes and --threads must be positive")
    if (args.out / "model.safetensors").exists():
        parser.error(f"--out {args.out} already holds a model; name another folder or remove it")
    return args


def main() -> int:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    try:
        split = load_split()
    except DataError as error:
        print(f"train_base: {error}", file=sys.stderr)
        return 1
    tokenizer = train_tokenizer(text for problem in split.base for text in (problem.question, problem.worked))
    base_rows, held_out_rows = packed(split.base, tokenizer), packed(split.held_out, tokenizer)
    model = LlamaForCausalLM(LlamaConfig(**model_config())).float()
    loss_of = loss_function(model, compiled=not args.no_compile)
    started_s, cpu_s = time.monotonic(), time.process_time()
    seen = train(model, loss_of, base_rows, args)
    model.eval()
    print(
        f"held-out loss {evaluate(loss_of, held_out_rows):.3f} nats/token after {seen} tokens, "
        f"{time.monotonic() - started_s:.0f} s, {time.process_time() - cpu_s:.0f} CPU s"
    )
    save(model, tokenizer, args.out)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
