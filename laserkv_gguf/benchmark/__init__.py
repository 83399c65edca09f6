"""Speed and memory of policies against llama.cpp's full cache at its best, in the same run.

Every measurement is a process of its own (`child`), so that its peak memory is its own and nothing
one leaves behind slows the next; they follow one another A B A B (`plan`). The full cache is read
and continued by llama.cpp alone, with the settings that a search found fastest here (`tuning`).
"""
