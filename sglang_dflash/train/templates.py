"""Template prompts: tasks x phrasings x languages or topics, for corpora without self-prompting.

They cost no target tokens and read like what people type; self-prompted ones are more varied.
A corpus for a good drafter wants both.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from sglang_dflash.train.prompts import TOPICS


def _items(text: str) -> list[str]:
    return [" ".join(item.split()) for item in text.split("|")]


_TASKS = _items(
    """
    reverses a string | checks if a number is prime | returns the factorial of a number | finds the largest
    number in a list | removes duplicates from a list | counts the vowels in a string | checks if a string
    is a palindrome | sorts a list of numbers in ascending order | merges two sorted lists | computes the
    sum of all even numbers in a list | returns the nth Fibonacci number | finds the second largest element
    | counts how often each word occurs in a text | converts Celsius to Fahrenheit | generates a random
    password | reads a file and prints each line | finds the longest word in a sentence | flattens a nested
    list | checks if two strings are anagrams | computes the average of a list of numbers | finds the
    greatest common divisor of two numbers | performs a binary search | implements bubble sort | implements
    quicksort | implements a stack with push and pop | implements a queue | implements a linked list with
    insert and delete | traverses a binary tree in order | rotates an array by k positions | finds all pairs
    that add up to a target | converts a decimal number to binary | validates an email address | capitalizes
    the first letter of each word | removes all whitespace from a string | computes the power of a number
    without using the power operator | transposes a matrix | multiplies two matrices | checks if a year is a
    leap year | counts the number of lines in a file | parses a CSV file and prints the total of a column |
    parses a JSON string and prints the keys | downloads a web page | sends a POST request | connects to a
    database and runs a query | prints a multiplication table | draws a triangle of stars | simulates
    rolling two dice | shuffles a deck of cards | computes the area of a circle | calculates compound
    interest | finds the missing number in a sequence | computes the difference between two dates | formats
    the current date and time | groups a list of words by their first letter | inverts a dictionary | merges
    two dictionaries | filters the odd numbers out of a list | finds the intersection of two lists | checks
    whether brackets are balanced | computes the Levenshtein distance of two strings | counts the digits of
    a number | sums the digits of a number | finds the median of a list | finds the mode of a list | splits
    a list into chunks of equal size | removes the nth node of a linked list | implements a simple
    calculator | implements a bank account with deposit and withdraw | implements a shopping cart |
    implements a to-do list with add and remove | retries a failing call three times | caches the results of
    a function | measures how long a function takes | logs messages to a file | replaces all occurrences of
    a word in a text | extracts all numbers from a string | checks if a list is sorted | generates all
    permutations of a string | generates all subsets of a set | computes the dot product of two vectors |
    normalizes a list of numbers | converts a Roman numeral to an integer | encrypts a text with a Caesar
    cipher | counts the words in a sentence | finds the shortest path in a graph | performs a depth-first
    search | performs a breadth-first search | zips two lists into a dictionary | prints the first n prime
    numbers | checks if a number is a perfect square | rounds a number to two decimals | truncates a string
    to a given length | deletes all empty lines of a file | renames all files in a folder | lists all files
    with a given extension | computes the checksum of a file | sorts a list of objects by a field | finds
    the most frequent element | implements a timer that counts down | creates a class for a student with
    name and grade | creates a class hierarchy of shapes with area methods | creates a rectangle class with
    width and height
    """
)
_QUERIES = _items(
    """
    lists all customers | counts the orders of each customer | finds the highest salary in each department |
    joins the orders and customers tables | returns the ten newest products | deletes all inactive users |
    updates the price of a product | finds duplicate email addresses | computes the total revenue per month
    | selects employees hired after 2020 | creates a table for books | adds an index to the users table |
    finds products that were never ordered | ranks students by grade
    """
)
_CONCEPTS = _items(
    """
    a list comprehension | a closure | recursion | an interface | a lambda function | a pointer |
    inheritance | polymorphism | exception handling | a generator | a decorator | a promise | a hash map |
    garbage collection | an abstract class | a template | a module | unit testing | multithreading | a
    regular expression | a constructor | type casting | a callback | scope | a REST API | a for loop | a
    while loop | a switch statement | string formatting | file handling
    """
)
_ANGLES = _items(
    """
    the history of {x} | the benefits of {x} | the future of {x} | common mistakes about {x} | the basics of
    {x} | the role of {x} in daily life | the science behind {x} | interesting facts about {x}
    """
)
_CODE = [
    "Write a {l} function that {t}.",
    "Write a {l} program that {t}.",
    "Can you write {l} code that {t}?",
    "Implement a function in {l} that {t}.",
    "Show me how to write a {l} function that {t}, and explain it.",
    "Write a short {l} script that {t}.",
    "Create a {l} function that {t} and give an example of its use.",
    "I need a {l} function that {t}.",
]
_ABOUT = [
    "Explain {c} in {l}.",
    "What is {c} in {l}? Give an example.",
    "Give a simple example of {c} in {l}.",
    "How does {c} work in {l}?",
]
_CHAT = [
    "Explain {x} in simple terms.",
    "What are the main facts about {x}?",
    "Give me five tips about {x}.",
    "Write a short story about {x}.",
    "Write a poem about {x}.",
    "Write a paragraph about {x}.",
    "Can you tell me about {x}?",
    "Write an email to a friend about {x}.",
    "List the advantages and disadvantages of {x}.",
    "What should a beginner know about {x}?",
    "Summarize {x} in a few sentences.",
    "Describe {x} to a ten-year-old.",
    "Why does {x} matter?",
    "Write a blog post about {x}.",
    "Give me three ideas for a project about {x}.",
    "I want to learn about {x}. Where should I start?",
    "What questions do people often ask about {x}?",
    "Compare {x} with {y}.",
    "How has {x} changed over time?",
    "Write a dialogue between two people about {x}.",
    "Make a plan for a week of learning about {x}.",
    "What is the connection between {x} and {y}?",
    "Write a speech about {x}.",
    "Create a quiz with five questions about {x}.",
]
_LANGUAGES = (
    ["Python"] * 7 + ["JavaScript"] * 3 + ["Java", "C++", "C", "Go", "Rust", "TypeScript", "C#", "Ruby"]
)


def _arithmetic(rng: random.Random) -> str:
    a, b, c = (rng.randint(2, 60) for _ in range(3))
    return rng.choice(
        [
            f"What is {a} times {b}?",
            f"A shop sells {a} apples a day at {b} cents each. How much does it earn in {c} days?",
            f"Solve for x: {a}x + {b} = {a * c + b}.",
            f"What is {a}% of {b * 10}?",
            f"Tom has {a + b} marbles and gives away {a}. How many are left?",
            f"A car drives {a * 10} km in {b} hours. What is its average speed?",
            f"Find the area of a rectangle with sides {a} and {b}.",
            f"Convert {a} miles to kilometers.",
        ]
    )


def template_prompts(seed: int) -> Iterator[tuple[str, str]]:
    """Endless (kind, prompt), 40 % code; repeats are the caller's to drop."""
    rng = random.Random(seed)
    while True:
        draw = rng.random()
        if draw < 0.33:
            text = rng.choice(_CODE).format(l=rng.choice(_LANGUAGES), t=rng.choice(_TASKS))
        elif draw < 0.34:
            text = f"Write a SQL query that {rng.choice(_QUERIES)}."
        elif draw < 0.4:
            text = rng.choice(_ABOUT).format(c=rng.choice(_CONCEPTS), l=rng.choice(_LANGUAGES))
        elif draw < 0.45:
            text = _arithmetic(rng)
        else:
            x, y = rng.choice(TOPICS), rng.choice(TOPICS)
            if rng.random() < 0.35:
                x = rng.choice(_ANGLES).format(x=x)
            text = rng.choice(_CHAT).format(x=x, y=y)
        yield ("code" if draw < 0.4 else "chat"), text
