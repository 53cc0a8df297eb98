"""The process asks for huge pages once, and never against its user's wish."""

import subprocess
import sys

from jft.hugepages import TUNABLE, with_huge_pages


def test_a_kernel_that_gives_huge_pages_on_request_is_asked():
    assert with_huge_pages({"A": "b"}, "madvise") == {"A": "b", "GLIBC_TUNABLES": f"{TUNABLE}=1"}
    others = {"GLIBC_TUNABLES": "glibc.malloc.check=1"}
    asked = with_huge_pages(others, "madvise")
    assert asked == {"GLIBC_TUNABLES": f"glibc.malloc.check=1:{TUNABLE}=1"}
    assert with_huge_pages(asked, "madvise") is None


def test_nothing_is_asked_where_it_is_decided_or_of_no_use():
    assert with_huge_pages({"GLIBC_TUNABLES": f"{TUNABLE}=0"}, "madvise") is None
    for kernel in ("always", "never", ""):
        assert with_huge_pages({}, kernel) is None


def test_the_process_starts_again_once_with_its_arguments_and_flags():
    program = """
import os, sys
from jft import hugepages
hugepages.mode = lambda: "madvise"
hugepages.use_huge_pages()
print(os.environ["GLIBC_TUNABLES"], sys.argv[1:], sys.flags.dont_write_bytecode, os.getpid())
"""
    command = [sys.executable, "-B", "-c", program, "train", "--config=a b"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={})
    output, _ = process.communicate()
    assert output == f"{TUNABLE}=1 ['train', '--config=a b'] 1 {process.pid}\n"
