"""What a vision-language judge is asked, and how its answer is read."""

import re
from pathlib import Path

from prx_post.base.errors import ConfigError

PROMPT_PLACE = "{prompt}"
DEFAULT_TEMPLATE = """\
Image 1 and Image 2 were made from one and the same prompt:

{prompt}

Which of them is better? Ask first which follows the prompt more closely: the objects, how many there are, their colours
and places, what happens, any words that were to be written. Then ask which is the better image: clear, well composed,
without defects. If the two disagree, the prompt counts for more. Which image comes first means nothing.

You may think first. End with exactly one of these three lines, and write nothing after it:
<answer>Image 1</answer>
<answer>Image 2</answer>
<answer>Tie</answer>
"""

FIRST, TIE, SECOND = 1.0, 0.5, 0.0
"""An answer, as the probability that the image shown first is the better one."""
VERDICTS = {
    "image 1": FIRST,
    "image 1 is better": FIRST,  # the form UnifiedReward-Think was trained on
    "image 2": SECOND,
    "image 2 is better": SECOND,
    "tie": TIE,
}
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)


def parse_answer(text: str) -> float | None:
    """FIRST, SECOND or TIE; None if `text` is no answer.

    After the thinking, if there is any, there must be one <answer> with one of VERDICTS in it, and nothing behind it.
    Nothing is guessed from prose: a judge that talks of both images and decides nothing is unparsable.
    """
    said = text.rpartition("</think>")[2]
    if "<think>" in said:  # cut off while thinking, where the answer is still a draft
        return None
    found = ANSWER.findall(said)
    if len(found) != 1 or not said.rstrip().lower().endswith("</answer>"):
        return None
    return VERDICTS.get(" ".join(found[0].split()).rstrip(".").lower())


def read_template(path: str | None) -> str:
    """The text of a question, with {prompt} in it; None gives DEFAULT_TEMPLATE.

    Raises:
        ConfigError: the file is missing, not UTF-8, or has no {prompt}.
    """
    if path is None:
        return DEFAULT_TEMPLATE
    try:
        template = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(
            f"judge_template_file is {path!r}, which cannot be read: {reason}. Correct the path or the file."
        ) from error
    if PROMPT_PLACE not in template:
        raise ConfigError(
            f"judge_template_file is {path!r}, but must hold {PROMPT_PLACE} because the judge has to know the prompt. "
            f"Write it where the prompt goes."
        )
    return template


def fill_template(template: str, prompt: str) -> str:
    """Not `str.format`: braces in prompts and templates are text."""
    return template.replace(PROMPT_PLACE, prompt)
