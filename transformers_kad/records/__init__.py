"""Statistics and trace of a finished call of `generate`.

Imports run in this order: `recorders` > `trace` > `trace_page` > `fragments` > `text_pieces` > `statistics`.
"""
