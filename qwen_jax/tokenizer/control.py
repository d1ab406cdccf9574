"""The control tokens of Qwen2.5."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ControlToken:
    """A token outside the learned vocabulary that is matched in a text as a whole.

    Args:
        content: the text of the token.
        special: whether `skip_special_tokens` removes it from decoded text. Tool-call and fill-in-the-middle tokens
            are not special, because programs read them in the text.
    """

    content: str
    special: bool


# In the order of their ids, which follow the last regular id. Source: tokenizer_config.json of the Qwen2.5 checkpoints.
CONTROL_TOKENS = tuple(
    ControlToken(content, special)
    for special, contents in (
        (
            True,
            "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
            "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>",
        ),
        (
            False,
            "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> "
            "<|file_sep|>",
        ),
    )
    for content in contents.split()
)
END_OF_TEXT = "<|endoftext|>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
