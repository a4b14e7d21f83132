"""Self-prompting: openers by kind that an instruct target completes into user turns of its own.

An opener fixes the kind and the topic, the target writes the rest; so a corpus needs no
dataset, and its prompts are of the sort the target knows how to answer.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass

KINDS = ("code", "chat", "questions", "explain", "write", "lists", "math", "edit")
WEIGHTS = {
    "code": 40, "chat": 12, "questions": 12, "explain": 10, "write": 10, "lists": 7, "math": 5, "edit": 4,
}  # fmt: skip

_LANGUAGES = [
    "Python", "Python", "Python", "Python", "Python", "Python", "JavaScript", "JavaScript", "JavaScript",
    "Java", "C++", "C", "TypeScript", "Go", "Rust", "SQL", "Bash", "C#", "Ruby", "PHP", "HTML and CSS",
]  # fmt: skip
_CODETOPICS = [
    "a list of numbers", "a string", "a dictionary", "two sorted arrays", "a binary tree", "a linked list",
    "a CSV file", "a JSON file", "dates and times", "a text file", "prime numbers", "the Fibonacci sequence",
    "a matrix", "a stack", "a queue", "a graph", "user input", "a web page", "an API request",
    "a bank account",
    "a shopping cart", "a student record", "temperature conversion", "palindromes", "word counts",
    "duplicates",
    "sorting", "searching", "recursion", "a class hierarchy", "email addresses", "passwords",
    "random numbers",
    "a to-do list", "a game of tic-tac-toe", "a calculator", "factorials", "anagrams", "a database table",
    "an employee table", "customer orders", "a timer", "a log file", "a range of integers", "nested lists",
    "vowels and consonants", "binary numbers", "a rectangle and a circle", "a cache", "a thread",
]  # fmt: skip
_CODE = [
    "Write a {lang} function that", "Write a {lang} program that", "Write a {lang} function to handle {code}",
    "Write a {lang} class that represents {code}", "Write a {lang} script that uses {code}",
    "How do I work with {code} in {lang}", "Implement a {lang} function that takes {code} and",
    "Can you write {lang} code that", "Fix the bug in this {lang} code:",
    "Explain what this {lang} code does:",
    "Create a {lang} function called", "In {lang}, how can I", "Write a unit test for a {lang} function that",
    "Given {code}, write a {lang} function that returns", "Refactor this {lang} function:",
    "Write a {lang} one-liner that", "I have a {lang} program with {code}. How",
    "Complete this {lang} function:\n",
    "Add comments to this {lang} code:", "Write a {lang} function which checks whether {code}",
    "What is the difference between", "Show me an example of {code} in {lang}",
    "Write a simple {lang} example of", "Write a {lang} loop that", "Convert this {lang} code to",
]  # fmt: skip
TOPICS = [
    "the solar system", "healthy food", "climate change", "Roman history", "job interviews", "gardening",
    "dogs",
    "music", "the ocean", "learning languages", "electric cars", "photography", "small businesses", "sleep",
    "coffee", "travel in Japan", "mountains", "time management", "the human brain", "friendship", "volcanoes",
    "money and saving", "chess", "birds", "the internet", "artificial intelligence", "painting", "running",
    "schools", "books", "cooking pasta", "ancient Egypt", "the Moon", "weather", "parenting", "stress",
    "public speaking", "architecture", "vaccines", "recycling", "football", "bread", "democracy", "trains",
    "insects", "robots", "movies", "memory", "energy", "plants", "mathematics", "poetry", "home repair",
    "the immune system", "black holes", "marketing", "farming", "rivers", "yoga", "computers", "statistics",
]  # fmt: skip
_OPENERS = {
    "chat": [
        "Hi! I", "Hello, can you help me with {topic}", "I need advice about {topic}", "I'm feeling",
        "Can you help me",
        "I want to learn about {topic}", "What do you think about {topic}", "My friend", "I am planning",
        "Do you have any tips for {topic}", "I have a problem with", "Tell me something about {topic}",
        "How should I",
        "I recently", "Could you recommend", "What should I do if", "I'm trying to understand {topic}",
        "Let's talk about",
    ],
    "questions": [
        "What is", "What are the main", "Why do", "Why is {topic}", "How does", "How do people", "When did",
        "Who was",
        "Where can", "Which", "Is it true that", "What happens when", "What is the difference between",
        "How many",
        "What causes", "What are the benefits of {topic}", "How is {topic}", "Who invented", "Can",
    ],
    "explain": [
        "Explain {topic}", "Explain how", "Explain why", "Explain the concept of", "Describe {topic}",
        "Describe how",
        "Explain {topic} to a child", "Give a short overview of", "Explain in simple terms", "Compare",
        "Define",
        "Describe the process of", "Summarize what is known about {topic}",
        "Explain the importance of {topic}",
    ],
    "write": [
        "Write a short story about", "Write a poem about {topic}", "Write an email to", "Write a letter",
        "Write a paragraph about {topic}", "Write a product description for",
        "Write a short essay on {topic}",
        "Write a dialogue between", "Write a blog post about {topic}", "Write a speech",
        "Write a scene in which",
        "Create a slogan for", "Write an introduction for", "Write a review of", "Write a thank you note",
    ],
    "lists": [
        "List five", "List the main", "Give me three", "Give me some ideas for {topic}", "Name ten",
        "List the steps to",
        "What are some examples of {topic}", "Create a list of", "Suggest", "Make a plan for {topic}",
        "List the pros and cons of",
    ],
    "math": [
        "Solve:", "What is the sum of", "Calculate", "A train", "If x", "Find the area of", "A store sells",
        "John has", "How do I solve", "What is the probability", "Sarah", "Find the value of", "Convert",
    ],
    "edit": [
        "Rewrite this sentence:", "Summarize the following text:", "Correct the grammar:",
        "Translate to French:",
        "Classify the following", "Rewrite the following paragraph to be more formal:",
        "Extract the key points from",
        "Make this email more polite:", "What is the sentiment of this review:", "Paraphrase:",
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Opener:
    kind: str
    text: str


def family(kind: str) -> str:
    """``code`` or ``chat``: the two kinds that judgements are given by."""
    return "code" if kind == "code" else "chat"


def openers(seed: int):
    """Endless openers, kinds drawn by ``WEIGHTS``; the same seed gives the same row."""
    rng = random.Random(seed)
    while True:
        kind = rng.choices(list(WEIGHTS), weights=list(WEIGHTS.values()))[0]
        if kind == "code":
            template = rng.choice(_CODE)
            text = template.format(lang=rng.choice(_LANGUAGES), code=rng.choice(_CODETOPICS))
        else:
            text = rng.choice(_OPENERS[kind]).format(topic=rng.choice(TOPICS))
        yield Opener(kind, text)


def clean_turn(text: str, finished: bool) -> str | None:
    """A user turn fit to be asked, or None. An unfinished one is cut after its last sentence."""
    text = text.strip()
    if not finished:
        ends = [m.end() for m in re.finditer(r"[.?!:](?=\s)|```(?=\n\n)|\n(?=\n)", text)]
        if not ends:
            return None
        text = text[: ends[-1]].strip()
    if "<|" in text or len(text.split()) < 4 or len(text) > 400:
        return None
    if text.count("```") % 2:
        text += "\n```"
    return text


def prompt_hash(text: str) -> int:
    """64-bit hash of the letters and digits of ``text``: equal for trivially different prompts."""
    plain = re.sub(r"[\W_]+", "", text.lower())
    return int.from_bytes(hashlib.sha256(plain.encode()).digest()[:8], "big")


def is_held_out(value: int, percent: int = 4) -> bool:
    """Whether the prompt of hash ``value`` belongs to the held-out split (a pure function of it)."""
    return value % 100 < percent
