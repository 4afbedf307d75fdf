"""Think blocks: where an output stops reasoning and begins to answer.

DeepSeek-R1, V3.1, V4 and Qwen3 all write `<think>reasoning</think>answer`. They differ
in who writes `<think>` (the prompt or the model) and in whether newlines around the
tags belong to the form, as in Qwen3's and R1's templates, or to the text, as in
DeepSeek-V4's encoding, which has none.

A block stands at the beginning of an output, or there is none: tags further on are
text. An output that ends inside its block is all reasoning. A call of a tool that is
written inside a block was thought of, not made.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxspark.text.events import Reasoning
from jaxspark.text.reader import SPACE, Program, Reader, Steps


@dataclass(frozen=True, kw_only=True)
class ThinkFormat:
    """How a model marks its reasoning.

    Attributes:
      begin: the tag before it.
      end: the tag behind it.
      newlines: whether newlines at the block's edges belong to the form.
    """

    begin: str = "<think>"
    end: str = "</think>"
    newlines: bool = True

    def opened_by(self, prompt: str, begun: str = "") -> bool:
        """Whether a prompt ends inside a block, so that the output begins there.

        Args:
          prompt: its end.
          begun: what of that is the answer's beginning, which the output continues.
        """
        before = prompt.rstrip().removesuffix(begun.rstrip())
        if self.end in begun:
            return False
        opens = begun.lstrip().startswith(self.begin)
        return opens or before.rstrip().endswith(self.begin)

    def program(
        self, *, opened: bool, over: Callable[[int], None] = lambda end: None
    ) -> Program:
        """A parser's program; its answer is what comes behind the block.

        Args:
          opened: whether the output begins inside a block.
          over: called with the characters up to the block's end, once it has one; 0
            if there is no block.
        """

        def run(reader: Reader) -> Steps[None]:
            if not (yield from self._begins(reader, opened)):
                over(0)
            else:
                edge = "\n" if self.newlines else ""
                yield from reader.span(edge)
                end = yield from reader.until(
                    (self.end,),
                    lambda text: reader.emit(Reasoning(text)),
                    before=edge,
                )
                if end is not None:
                    reader.clear_mark()
                    over(reader.position)
                    yield from reader.span(edge)
            yield from reader.until((), reader.content)

        return run

    def _begins(self, reader: Reader, opened: bool) -> Steps[bool]:
        """Whether there is a block; its tag is read."""
        reader.set_mark()
        yield from reader.span(SPACE)
        if (yield from reader.accept(self.begin)):
            reader.clear_mark()
            return True
        reader.rewind()
        return opened
