"""How large each measurement is: on a GPU, and on a CPU to try the scripts."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of all measurements. Lengths are in tokens.

    Attributes:
      model: name of a published architecture; its output head is not its embedding.
      dtype: of products and cache.
      max_seqs: requests that run at a time.
      requests: of the file of lengths, which are used.
      shrink: by what the lengths of the file are divided.
      max_length: of a prompt and its text, for the lengths of the file and for even lengths.
      even: length of prompts and of answers, at each of these concurrencies.
      concurrency: see `even`.
      rates: arrivals a second; each lasts `arrival_seconds`.
      arrival_seconds: see `rates`.
      long: length of every tenth prompt that arrives, and `longest` of such a text.
      longest: see `long`.
      chunked, whole: prompt tokens of a step, with prompts in chunks and without.
      single: prompt and answer of one request alone.
      shared_prompt: length of prompts that share 90%, `shared_new` of their answers.
      shared_new: see `shared_prompt`.
      shared_requests: how many of them.
      constrained: requests at a time, and tokens of each, with a grammar.
      period: tokens after which a text repeats itself, for speculation.
      repetitive: prompt and answer of such a text.
      peer_requests: of the lengths, for transformers. Fewer would have another concurrency.
    """

    model: str = "qwen2.5-7b"
    dtype: str = "bfloat16"
    max_seqs: int = 256
    requests: int = 512
    shrink: int = 1
    max_length: int = 2048
    even: int = 1000
    concurrency: tuple[int, ...] = (64, 256)
    rates: tuple[float, ...] = (8.0, 24.0)
    arrival_seconds: float = 30.0
    long: int = 3500
    longest: int = 4096
    chunked: int = 512
    whole: int = 4096
    single: tuple[int, int] = (512, 512)
    shared_prompt: int = 2000
    shared_new: int = 32
    shared_requests: int = 256
    constrained: tuple[tuple[int, int], ...] = ((1, 256), (64, 256))
    period: int = 50
    repetitive: tuple[int, int] = (128, 512)
    peer_requests: int = 512


SIZES = {
    "7b": Size(),
    "0.5b": Size(model="qwen2.5-0.5b"),
    "tiny": Size(
        model="tiny-untied",
        dtype="float32",
        max_seqs=4,
        requests=6,
        shrink=32,
        max_length=64,
        even=12,
        concurrency=(2,),
        rates=(40.0,),
        arrival_seconds=0.2,
        long=40,
        longest=96,
        chunked=16,
        whole=64,
        single=(12, 12),
        shared_prompt=80,
        shared_new=2,
        shared_requests=6,
        constrained=((2, 12),),
        period=5,
        repetitive=(8, 40),
        peer_requests=6,
    ),
}
