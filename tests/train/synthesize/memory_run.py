"""Runs a pipeline of cheap items and prints the peak of the memory in MB: `python memory_run.py FOLDER ITEMS`."""

import sys
from collections.abc import Iterator
from pathlib import Path

from train.synthesize.context import Context
from train.synthesize.generator import Answer, Request
from train.synthesize.item import Item, Rejected, make_item
from train.synthesize.pipeline import Output, Pipeline, Result, Stage
from train.synthesize.run import run


class _Echo:
    """A generator that answers at once, and remembers nothing."""

    model, concurrency = "echo", 16

    async def ask(self, request: Request) -> Answer:
        return Answer(str(request.messages[-1]["content"]), tokens=300)

    async def close(self) -> None:
        pass


async def ask(item: Item, context: Context) -> Result:
    (answer,) = await context.ask(item["text"])
    return item.update(answer=answer.text)


async def verify(item: Item, context: Context) -> Result:
    return item if item["number"] % 4 else Rejected("a multiple of four", item["answer"])


def main(folder: Path, items: int) -> None:
    def source() -> Iterator[Item]:
        # 3 kB a text.
        return (make_item({"number": i, "text": f"{i} " + "text " * 600}) for i in range(items))

    output = Output("sft", lambda item: [{"prompt": item["text"], "completion": item["answer"]}])
    run(
        Pipeline("echo", source, [Stage("ask", ask), Stage("verify", verify)], [output]), {"generator": _Echo()}, folder
    )
    # Not ru_maxrss, which begins with the peak of the parent.
    status = Path("/proc/self/status").read_text()
    print(int(status.partition("VmHWM:")[2].split()[0]) / 1024)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
