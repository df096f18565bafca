"""Numbers that cannot be true: a rate above the peak, fewer bytes than the mask needs, less time than the bytes take.

Such a number is the mark of a kernel that computes nothing, of a rank that receives nothing, of a timer that stops too early. Every
bound holds for any sound run, however well it is done, so that none is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

from lcbench.problem import Heads

# A number may pass its bound by so much: clocks and data sheets are not exact.
MARGIN = 1.02


def lower_bound_bytes(
    rank_rows: int, remote_pairs: float, remote_keys: int, heads: Heads, itemsize: int, *, queries_elsewhere: bool = False
) -> float:
    """Bytes that cross a rank's boundary in one pass at least, in and out together; forward and backward each.

    Proof. Take the pairs (query row whose result the rank gives, key that it does not hold) that the mask allows, over the query
    heads of these results: ``remote_pairs``. Each is computed at some rank. In forward:

    * At this rank: then that key and value came in, for the key/value head that the query head reads: D + Dv elements, of latent
      heads D. They serve at most g * ``rank_rows`` of the pairs: each row, for each of the g = Hq / Hk query heads that read them.
    * Elsewhere, at the key's owner or at a third rank: then a row of out came back, for that query head, of Dv elements, and that
      row of q went out, of D elements, unless other ranks were given it too. However many ranks computed parts of the row, their
      results can be merged before they come back, and q can be passed on, so the boundary is crossed once each way. They serve at
      most ``remote_keys`` of the pairs.

    So the bytes per pair are at least the smaller of both. In backward the same holds, also if everything of forward was kept: for
    pairs that are computed here the sum of their dk and dv goes out, once per key and key/value head; for those that are computed
    elsewhere a row of dout goes out and a row of dq comes back.

    No element is smaller than the inputs': partial results and gradients travel in the inputs' type or a wider one. LSE, and what
    ranks move that is not needed, come on top.

    Args:
        rank_rows: query rows whose results the rank gives.
        remote_pairs: pairs of such a row and a key that the rank does not hold, which the mask allows, over the query heads.
        remote_keys: keys that the rank does not hold; fewer are fine if no row sees the rest.
        itemsize: bytes of an element of the inputs.
        queries_elsewhere: whether other ranks are given the same queries.
    """
    if not remote_pairs:
        return 0.0
    here = heads.kv_width / (rank_rows * (heads.q // heads.kv))
    elsewhere = (heads.v if queries_elsewhere else heads.dim + heads.v) / remote_keys
    return itemsize * remote_pairs * min(here, elsewhere)


def lower_bound_sent(bounds: Sequence[float]) -> float:
    """Bytes that the rank that sends most sends at least, from ``lower_bound_bytes`` of every rank.

    What crosses a rank's boundary is sent by it or to it, so all ranks together send at least half of the sum of the bounds.
    """
    return sum(bounds) / 2 / len(bounds)


def lower_bound_memory(queries: float, results: float, keys: float, heads: Heads, itemsize: int, *, backward: bool) -> float:
    """Bytes of memory that a rank reads or writes at least in one forward pass, or in one backward pass.

    Forward reads q, k, v and writes out; backward reads q, k, v, dout and writes dq, dk, dv. Values of latent heads are in their
    keys.

    Args:
        queries: rows of q that see a key, over the query heads, and that no other rank was given: others may be read there.
        results: rows of out that the rank gives and that see a key, over the query heads.
        keys: keys that a query row of any rank sees, over the key/value heads, and that no other rank was given.
    """
    q, out, kv = queries * heads.dim, results * heads.v, keys * heads.kv_width
    return itemsize * (2 * q + out + 2 * kv if backward else q + out + kv)


def implausible(
    phase: str,
    *,
    seconds: float,
    flops: float,
    peak_tflops: float,
    peak_source: str,
    bytes_sent: float | None = None,
    least_bytes_sent: float = 0.0,
    link_gbytes_per_s: float | None = None,
    memory_bytes: float = 0.0,
    memory_gbytes_per_s: float | None = None,
    cache_bytes: float | None = None,
) -> str | None:
    """Why the numbers of a phase cannot be true, in one line; None if they can.

    Args:
        phase: ``forward`` or ``backward``, for the message.
        seconds: the fastest iteration, each as long as its slowest rank.
        flops: of the mask, in this phase, over all ranks, divided by the ranks.
        peak_tflops: TFLOP/s that nothing exceeds on one device: ``configured_limit``, else all ranks' largest ``measured_limit``.
        peak_source: where that comes from, such as ``matrix product measured on AMD EPYC``.
        bytes_sent: by the rank that sends most, in this phase; None if nobody counted.
        least_bytes_sent: what ``lower_bound_sent`` says of them; 0 without context parallelism.
        link_gbytes_per_s: of all links that leave one device, one way (conf/device); None where it is not known, and on CPU. Links
            between nodes are slower, but not everything has to pass them.
        memory_bytes: what ``lower_bound_memory`` says of the rank where it is largest.
        memory_gbytes_per_s: read and written, of one device (conf/device); None where it is not known, and on CPU.
        cache_bytes: of one device's last-level cache (conf/device); None as the rate. What fits into it may be there from the
            iteration before, and may stay there at the end: bytes of twice its size need no memory.
    """
    return (
        above_peak(phase, seconds, flops, peak_tflops, peak_source)
        or too_few_bytes(phase, bytes_sent, least_bytes_sent)
        or faster_than(phase, "links", seconds, max(bytes_sent or 0.0, least_bytes_sent), link_gbytes_per_s)
        or faster_than(phase, "memory", seconds, memory_bytes - 2 * (cache_bytes or 0.0), memory_gbytes_per_s)
    )


def above_peak(phase: str, seconds: float, flops: float, peak_tflops: float, peak_source: str) -> str | None:
    """FLOPs of one device in less time than its peak allows."""
    if flops <= MARGIN * peak_tflops * 1e12 * seconds:
        return None
    if not seconds:
        return f"{phase}: {flops:.3g} FLOPs per device in no time"
    rate = flops / seconds / 1e12
    return f"{phase}: {rate:.3g} TFLOP/s per device is {rate / peak_tflops:.3g} times the peak of {peak_tflops:.3g} ({peak_source})"


def too_few_bytes(phase: str, bytes_sent: float | None, least: float) -> str | None:
    """Fewer bytes sent than the mask needs; this bound is exact, so without a margin but for rounding."""
    if bytes_sent is None or bytes_sent >= least * (1 - 1e-9):
        return None
    return f"{phase}: the busiest rank sent {bytes_sent:.6g} bytes, the mask needs {least:.6g} from it at least"


def faster_than(phase: str, what: str, seconds: float, moved: float, gbytes_per_s: float | None) -> str | None:
    """Bytes in less time than ``what`` needs for them."""
    if gbytes_per_s is None or moved <= MARGIN * gbytes_per_s * 1e9 * seconds:
        return None
    needed = moved / gbytes_per_s / 1e9
    return f"{phase}: {seconds:.3g} s is less than the {needed:.3g} s of {moved:.3g} bytes over {what} at {gbytes_per_s:.4g} GB/s"
