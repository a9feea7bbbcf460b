"""Attacks on unlearned models: does what was unlearned come back, how fast, and was it in the weights all the time?"""
