# SPDX-License-Identifier: Apache-2.0
"""Names of languages as prompts use them, and which of them are code."""

from __future__ import annotations

# CodeSearchNet's six, and others that people have pairs of.
CODE_LANGUAGES = frozenset(
    {"python", "java", "javascript", "go", "php", "ruby", "c", "c++", "cpp", "c#", "c-sharp", "rust",
     "typescript", "kotlin", "scala", "swift", "shell", "bash", "sql", "html", "css", "lua", "perl", "r", "julia",
     "haskell", "code"}
)  # fmt: skip

# English names by the code of django's catalogues.
NAMES = {
    "af": "Afrikaans", "ar": "Arabic", "az": "Azerbaijani", "be": "Belarusian", "bg": "Bulgarian", "bn": "Bengali",
    "ca": "Catalan", "cs": "Czech", "cy": "Welsh", "da": "Danish", "de": "German", "el": "Greek", "en": "English",
    "eo": "Esperanto", "es": "Spanish", "et": "Estonian", "eu": "Basque", "fa": "Persian", "fi": "Finnish",
    "fr": "French", "ga": "Irish", "gl": "Galician", "he": "Hebrew", "hi": "Hindi", "hr": "Croatian",
    "hu": "Hungarian", "hy": "Armenian", "id": "Indonesian", "is": "Icelandic", "it": "Italian", "ja": "Japanese",
    "ka": "Georgian", "kk": "Kazakh", "ko": "Korean", "ky": "Kyrgyz", "lt": "Lithuanian", "lv": "Latvian",
    "mk": "Macedonian", "mn": "Mongolian", "mr": "Marathi", "nb": "Norwegian", "ne": "Nepali", "nl": "Dutch",
    "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sk": "Slovak", "sl": "Slovenian",
    "sq": "Albanian", "sr": "Serbian", "sv": "Swedish", "ta": "Tamil", "te": "Telugu", "tg": "Tajik", "th": "Thai",
    "tr": "Turkish", "uk": "Ukrainian", "ur": "Urdu", "uz": "Uzbek", "vi": "Vietnamese", "zh_Hans": "Chinese",
}  # fmt: skip


def is_code(language: str) -> bool:
    """Whether a name (of any capitalisation) is that of a programming language: its text is formatted.

    Codes of django's catalogues are human languages: ``cs`` is Czech.
    """
    return name_of(language).lower() in CODE_LANGUAGES


def name_of(language: str) -> str:
    """The English name of a language code; a name stays as it is."""
    return NAMES.get(language, language)


def prompt(source: str, target: str) -> str:
    r"""``translate {source} to {target}: \n``, as the released checkpoint was trained with; the newline is a token."""
    return f"translate {name_of(source)} to {name_of(target)}: \n"
