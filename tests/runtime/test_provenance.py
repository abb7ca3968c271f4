"""What made a result: the commit of the code and the command as typed."""

import subprocess

from marval.runtime import provenance


def test_the_commit_says_when_the_code_differs_from_it(tmp_path, monkeypatch):
    def git(*arguments):
        told = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(["git", *told, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "runtime" / "provenance.py"))
    commit = provenance.commit.__wrapped__
    git("init", "-q")
    git("commit", "-qm", "theirs", "--allow-empty")
    (tmp_path / "config.py").write_text("a = 1")
    assert commit() == "not a checkout"  # installed in a folder of somebody else's repository
    git("add", ".")
    git("commit", "-qm", "first")
    assert commit() == git("rev-parse", "HEAD")
    (tmp_path / "results.json").write_text("{}")  # what the command itself writes is no code
    assert commit() == git("rev-parse", "HEAD")
    (tmp_path / "config.py").write_text("a = 2")
    assert commit() == git("rev-parse", "HEAD") + "-dirty"


def test_results_say_which_program_made_them(monkeypatch):
    programs = {
        "/src/marval/__main__.py": "marval",
        "/checkout/tools/plan.py": "python tools/plan.py",
        "/checkout/examples/train_vae.py": "python examples/train_vae.py",
        "/checkout/examples/emoji/judge.py": "python examples/emoji/judge.py",
    }
    for typed, said in programs.items():
        monkeypatch.setattr("sys.argv", [typed, "--out", "a b"])
        assert provenance.command_line() == f"{said} --out 'a b'"
