"""The loop, and what surrounds a step: streams, averages, evaluation, the health of the numbers, callbacks."""
