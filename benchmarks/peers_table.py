def run(o): return 0
