"""The policy's instructions on how to reply, appended to its role in training, validation, evaluation and chat.

A text is a Jinja template for each language (`instruction_texts/NAME/LANGUAGE.j2`); `reasons` is true in it where the policy
reasons before it replies."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from itertools import product
from pathlib import Path

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError
from jinja2.sandbox import SandboxedEnvironment

from ctcgrpo.errors import PolicyError
from ctcgrpo.util.naming import did_you_mean

NO_INSTRUCTIONS = "none"
DEFAULT_INSTRUCTIONS = "eibench"
_ANY = ""
_SUFFIX = ".j2"
_PACKAGED = files("ctcgrpo.policy") / "instruction_texts"
_jinja = SandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)


@dataclass(frozen=True, slots=True)
class Instructions:
    """`setting` is what a recipe names them by; `texts` holds a template by language, one under "" is for every language."""

    setting: str = NO_INSTRUCTIONS
    texts: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """8 hexadecimal digits of the texts."""
        return hashlib.sha256("\0".join(f"{k}\0{self.texts[k]}" for k in sorted(self.texts)).encode()).hexdigest()[:8]

    @property
    def name(self) -> str:
        """The setting, with a digest where there are texts: instructions that differ in a word have different names."""
        return f"{self.setting} ({self.digest})" if self.texts else self.setting

    def text(self, language: str, reasons: bool) -> str:
        """The instructions in a language; empty where there are none. Raises PolicyError for a language without a text."""
        if not self.texts:
            return ""
        template = self.texts.get(_ANY) or self.texts.get(language)
        if template is None:
            known = f"has no text for language {language!r}, only {', '.join(sorted(self.texts))}"
            advice = f"name a file or folder of your own, or {NO_INSTRUCTIONS}"
            raise PolicyError(f"policy.instructions {self.name} {known}; {advice}")
        return _rendered(template, reasons)


WITHOUT = Instructions()


@lru_cache
def _rendered(template: str, reasons: bool) -> str:
    return _jinja.from_string(template).render(reasons=reasons).strip()


def load_instructions(setting: str) -> Instructions:
    """By the setting policy.instructions: the name of one of this package's, `none`, a template file for every language, or a
    folder with LANGUAGE.j2 files. Raises PolicyError for one that is not there, is empty or is no template."""
    if setting == NO_INSTRUCTIONS:
        return WITHOUT
    names = sorted(entry.name for entry in _PACKAGED.iterdir() if entry.is_dir())
    path = Path(str(_PACKAGED / setting)) if setting in names else Path(setting).expanduser()
    try:
        if path.is_file():
            found = {_ANY: path.read_text(encoding="utf-8")}
        elif path.is_dir():
            found = {file.stem: file.read_text(encoding="utf-8") for file in sorted(path.glob(f"*{_SUFFIX}"))}
        else:
            hint = did_you_mean(setting, [*names, NO_INSTRUCTIONS])
            raise PolicyError(f"policy.instructions = {setting!r}: no such file or folder; {hint}")
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"policy.instructions {setting!r} cannot be read: {error}") from None
    if not found:
        raise PolicyError(f"policy.instructions = {setting!r}: expected LANGUAGE{_SUFFIX} files, for example en{_SUFFIX}")
    instructions = Instructions(setting, found)
    for language, reasons in product(found, (False, True)):
        where = f"policy.instructions {instructions.name}" + (f", {language}{_SUFFIX}" if language else "")
        try:
            text = instructions.text(language, reasons)
        except TemplateError as error:
            line = f"line {error.lineno}: " if isinstance(error, TemplateSyntaxError) else ""
            raise PolicyError(f"{where}: {line}{error.message}; a template knows one variable, reasons") from None
        if not text:
            empty = f"gives an empty text with reasons={reasons}"
            raise PolicyError(f"{where} {empty}; set {NO_INSTRUCTIONS} for no instructions")
    return instructions
