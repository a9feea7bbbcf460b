"""Is a score exact, does it predict, can it predict?"""
