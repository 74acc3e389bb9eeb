"""What the person at the terminal sees: a live panel on a terminal, ``key=value`` lines everywhere else."""

from __future__ import annotations

import io
import os
import sys
from collections import deque
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from epmoe.errors import printable
from epmoe.metrics.step_record import LayerHealth, StepRecord
from epmoe.metrics.trackers import Tracker

OVERLOADED = 3.0
"""An expert with more than this many times its even share is called overloaded."""
_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 16


def make_display(total_steps: int, stream: TextIO | None = None) -> Tracker:
    """The display for a stream (default: stdout): live on a terminal, one line per record elsewhere.

    Both raise when the stream is gone, after silencing it, so that ``Trackers`` can leave them out.
    """
    # stdout is None in a process started with it closed: what is printed goes nowhere
    stream = stream or sys.stdout or _Nowhere()
    console = _Console(file=stream)
    # isatty, not console.is_terminal: a CI that forces colours still wants lines, not a panel
    if stream.isatty() and not console.is_dumb_terminal:
        return LiveDisplay(total_steps, console)
    return LineDisplay(total_steps, stream)


class LineDisplay:
    """One line of ``key=value`` pairs per record."""

    def __init__(self, total_steps: int, stream: TextIO) -> None:
        self._total, self._stream = total_steps, stream
        self._shown = -1
        """Step of the last line."""

    def log(self, record: StepRecord) -> None:
        """Prints and flushes one line; of a step that is shown already, only its validation."""
        line = plain_line(record, self._total)
        if record.step == self._shown:
            line = " ".join(part for part in line.split(" ") if part.startswith(("step=", "val_")))
        self._shown = record.step
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except OSError:
            _silence(self._stream)
            raise

    def close(self) -> None:
        """Nothing is left to do."""


class LiveDisplay:
    """A panel that is redrawn in place: progress, speed, and the load of every expert; validation stays above."""

    def __init__(self, total_steps: int, console: Console) -> None:
        self._total, self._console = total_steps, console
        self._losses: deque[float] = deque(maxlen=_SPARK_WIDTH)
        # Drawn only when a record comes: no thread that could meet a closed terminal on its own.
        self._live = Live(console=console, auto_refresh=False, vertical_overflow="ellipsis")
        self._live.start()

    def log(self, record: StepRecord) -> None:
        """Redraws the panel."""
        self._losses.append(record.loss)
        if record.val:
            losses = "  ".join(f"{name} {value:.4f}" for name, value in record.val.items())
            said = printable(f"step {record.step:,}: validation loss {losses}")
            self._console.print(Text(said, style="bold"))
        self._live.update(panel(record, self._total, self._losses), refresh=True)

    def close(self) -> None:
        """Leaves the last panel standing and gives the cursor back."""
        self._live.stop()


class _Nowhere(io.StringIO):
    """Forgets what is written to it."""

    def write(self, text: str) -> int:
        return len(text)


class _Console(Console):
    """Rich ends the process when its pipe breaks; a training run has better things to do."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        _silence(self.file)
        raise BrokenPipeError("the reader of the output is gone")


def say(text: str) -> None:
    """Prints and flushes a line or more. Nobody reading any more (``| head``) is no reason to stop training."""
    try:
        print(printable(text), flush=True)
    except OSError:
        _silence(sys.stdout)


def _silence(stream: object) -> None:
    """Points the stream's descriptor at /dev/null, so that not even the flush at exit can fail."""
    try:
        descriptor = stream.fileno()  # type: ignore[attr-defined]
    except (OSError, ValueError, AttributeError):
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


# --------------------------------------------------------------------------------------------- drawing
def plain_line(record: StepRecord, total_steps: int) -> str:
    """``step=20/100 loss=4.2150 ...``: the record on one line for logs and ``grep``."""
    pairs = {
        "step": f"{record.step}/{total_steps}",
        "loss": loss_text(record),
        **{f"loss_{name}": f"{value:.4f}" for name, value in record.source_loss.items()},
        **{f"val_{name}": f"{value:.4f}" for name, value in record.val.items()},
        **{name: f"{value:.4f}" for name, value in record.aux.items()},
        "lr": f"{record.lr:.2e}",
        "grad_norm": f"{record.grad_norm:.3f}",
        "tok/s": f"{record.tokens_per_second:.0f}",
        "gflop/s": f"{record.flops_per_second / 1e9:.1f}",
        **({} if record.mfu is None else {"mfu": f"{record.mfu:.3f}"}),
        "mem_gib": f"{record.memory_gib:.2f}",
    }
    if record.layers:
        layers = record.layers.values()
        pairs["drop"] = f"{record.drop_rate:.4f}"
        pairs["load_max"] = f"{max(layer.max_over_mean for layer in layers):.2f}"
        pairs["dead"] = str(sum(len(layer.dead_experts) for layer in layers))
    if record.skipped_steps:
        pairs["skipped"] = str(record.skipped_steps)
    if record.empty_steps:
        pairs["empty"] = str(record.empty_steps)
    if record.loss_scale is not None:
        pairs["loss_scale"] = f"{record.loss_scale:g}"
        pairs["overflows"] = str(record.overflowed_steps)
    pairs["eta"] = duration(seconds_left(record, total_steps)).replace(" ", "")
    return printable(" ".join(f"{key}={value}" for key, value in pairs.items()))


def panel(record: StepRecord, total_steps: int, losses: deque[float]) -> RenderableType:
    """The live picture: a progress line, two lines of numbers, one strip per MoE layer."""
    progress = Table.grid(expand=True, padding=(0, 1))
    progress.add_column(no_wrap=True)
    progress.add_column(ratio=1)
    progress.add_column(no_wrap=True)
    progress.add_row(
        Text(f"step {record.step:,} / {total_steps:,}", style="bold"),
        ProgressBar(total=total_steps, completed=record.step, complete_style="cyan"),
        Text(f"{record.step / total_steps:4.0%}  eta {duration(seconds_left(record, total_steps))}"),
    )
    return Group(progress, _numbers(record, losses), *([_layers(record)] if record.layers else []))


def _numbers(record: StepRecord, losses: deque[float]) -> Text:
    text = Text("loss ")
    text.append(loss_text(record), style="bold")
    text.append(f" {sparkline(losses)}", style="cyan")
    text.append(f"  lr {record.lr:.2e}  grad {record.grad_norm:.2f}")
    if record.clip < 1:
        text.append(" clipped", style="yellow")
    for name, value in (*record.source_loss.items(), *record.aux.items()):
        text.append(printable(f"  {name} {value:.3f}"))
    speed = f"{record.mfu:.1%} MFU" if record.mfu is not None else flops(record.flops_per_second)
    text.append(f"\n{record.tokens_per_second:,.0f} tok/s  {speed}  {record.memory_gib:.2f} GiB")
    if record.layers:
        text.append(f"  drop {record.drop_rate:.1%}")
    if record.skipped_steps:
        text.append(f"  {record.skipped_steps} steps skipped", style="bold yellow")
    if record.empty_steps:
        text.append(f"  {record.empty_steps} steps empty", style="bold yellow")
    if record.loss_scale is not None:
        text.append(f"  loss scale {record.loss_scale:g}, {record.overflowed_steps} overflows")
    return text


def _layers(record: StepRecord) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    table.add_column(no_wrap=True)
    for number, layer in sorted(record.layers.items()):
        words = f"max {layer.max_over_mean:.1f}x  entropy {layer.entropy:.2f}  drop {layer.drop_rate:.1%}"
        if layer.dead_experts:
            words += f"  {len(layer.dead_experts)} without tokens"
        table.add_row(f"layer {number}", load_strip(layer), Text(words))
    return table


def load_strip(layer: LayerHealth) -> Text:
    """One cell per expert: half height = an even share, full block = overloaded, a cross = no tokens."""
    strip = Text()
    for share in layer.share_E:
        ratio = share * len(layer.share_E)
        if ratio == 0:
            strip.append("×", style="bold magenta")
        elif ratio > OVERLOADED:
            strip.append(_BLOCKS[-1], style="bold yellow")
        else:
            strip.append(_BLOCKS[min(int(ratio * 4), 6)], style="cyan")
    return strip


def loss_text(record: StepRecord) -> str:
    """The loss; ``null`` where no token counted in it."""
    return "null" if record.loss_tokens == 0 else f"{record.loss:.4f}"


def sparkline(values: deque[float]) -> str:
    """The last values as a row of blocks, lowest to highest; nothing where a value is not finite."""
    finite = [v for v in values if abs(v) < float("inf")]
    if not finite:
        return ""
    low, span = min(finite), (max(finite) - min(finite)) or 1.0
    return "".join(_BLOCKS[int((v - low) / span * 7)] if abs(v) < float("inf") else " " for v in values)


def seconds_left(record: StepRecord, total_steps: int) -> float:
    """Estimated from the last steps; NaN where nobody measured them."""
    return (total_steps - record.step) * record.seconds_per_step


def duration(seconds: float) -> str:
    """``3m 12s``; ``?`` when it is not known."""
    if not abs(seconds) < 1e9:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02}m"
    return f"{minutes}m {rest:02}s" if minutes else f"{rest}s"


def flops(per_second: float) -> str:
    """``12.3 GFLOP/s``, with the unit that leaves one to three digits before the point."""
    for unit in ("", "K", "M", "G", "T", "P"):
        if abs(per_second) < 1000 or unit == "P":
            break
        per_second /= 1000
    return f"{per_second:.1f} {unit}FLOP/s"
