"""The reference trainer behind `kdkernels distill`: real text, a real tokenizer, a teacher, two students, one table.

Read `distill.py` from top to bottom for the whole job. The other files hold what it calls: config (settings), data
(text to batches), models (teacher and student), losses (names to modules), loop (training steps), checkpoint (files
that survive a kill), evaluate (held-out figures), report (bars, table, curves).
"""
