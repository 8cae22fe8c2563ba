import subprocess
import sys

from fastgpt.data.sources import corpus_fingerprint
from fastgpt.data.stdlib import built_in_docstrings, sources, stdlib_documents


def test_the_corpus_is_several_megabytes_in_many_documents() -> None:
    texts = list(stdlib_documents())
    assert len(texts) > 500
    assert 5e6 < sum(len(text.encode()) for text in texts) < 30e6
    assert max(len(text.encode()) for text in texts) <= 2**17
    assert all(text.strip() for text in texts)


def test_it_holds_topics_sources_and_docstrings_of_c_modules() -> None:
    text = "\n".join(stdlib_documents())
    assert "The assignment statement" in text or "Assignment statements" in text
    assert "class OrderedDict(dict):" in text
    assert "Return the arc cosine (measured in radians) of x." in text


def test_tests_and_what_others_installed_are_left_out() -> None:
    names = [name for name, _ in sources()]
    assert "json/decoder.py" in names
    assert not [name for name in names if {"test", "tests", "site-packages", "idlelib"} & set(name.split("/"))]


def test_no_docstring_comes_twice() -> None:
    text = b"".join(content for _, content in built_in_docstrings()).decode()
    assert text.count("Initialize self.  See help(type(self)) for accurate signature.") == 1


def test_reading_it_imports_no_module_that_does_something() -> None:
    code = (
        "import sys; from fastgpt.data.stdlib import stdlib_documents; list(stdlib_documents())\n"
        "print([m for m in ('this', 'antigravity', 'turtle', 'tkinter', '_tkinter', 'readline', 'torch') "
        "if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]" and result.stderr == ""


def test_another_process_finds_the_same_corpus_whatever_it_has_changed() -> None:
    code = (
        "import sys; sys.excepthook = sys.displayhook = lambda *_: None\n"
        "from fastgpt.data.sources import corpus_fingerprint; print(corpus_fingerprint('stdlib'))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == corpus_fingerprint("stdlib")
