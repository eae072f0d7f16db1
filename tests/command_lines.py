"""Command lines that recipes refuse."""


def error_of(main, arguments, capsys):
    """What a recipe writes to standard error where it ends with the status 2, of itself or of its parser."""
    try:
        status = main(arguments)
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    return capsys.readouterr().err
