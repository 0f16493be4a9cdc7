from adamerge_jax.cli.console import make_console


def test_a_file_takes_wide_tables(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert make_console().width == 120
    assert make_console(width=220).width == 220


def test_columns_says_otherwise(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "70")
    assert make_console(width=220).width == 70


def test_brackets_are_no_markup(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "70")
    make_console().print("runs/[v2]/report.html")
    assert capsys.readouterr().out == "runs/[v2]/report.html\n"
