"""Everything the demo's people can talk about: kinds of facts, values, phrasings, small talk.

A *slot* is one thing a user may tell ("the name of my cat"); a *family* groups the slots that share
values and phrasings. Values are single words that always follow a space, so that the tokenizer
gives each of them one token. 32 slots share 274 values.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Slots of one type. `{n}` stands for the slot's noun, `{v}` for the value.

    Statements and questions say `my {n}`; the answer says `your {n}` and ends with the value, so
    that a reader of the answer knows which token carries the memory.
    """

    name: str
    nouns: tuple[str, ...]
    values: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Slot:
    """One tellable thing: a noun within a family."""

    family: Family
    noun: str


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FAMILIES = (
    Family(
        name="pet",
        nouns=("cat", "dog", "parrot"),
        values=_words(
            "Miro Nori Biscuit Pepper Luna Ziggy Mocha Pixel Rufus Tango Waffle Pluto Olive Ginger "
            "Bandit Coco Felix Hazel Jasper Kiwi Lucky Maple Noodle Oreo Pumpkin Rocky Shadow "
            "Smokey Teddy Willow"
        ),
        statements=(
            "My {n} is called {v}.",
            "The name of my {n} is {v}.",
            "I have a {n} and I named it {v}.",
            "At home I have a {n} called {v}.",
        ),
        questions=(
            "What is my {n} called?",
            "What is the name of my {n}?",
            "Do you remember how I named my {n}?",
        ),
        answer="Your {n} is called {v}.",
    ),
    Family(
        name="person",
        nouns=("brother", "sister", "boss", "neighbour", "friend", "teacher"),
        values=_words(
            "Anna Boris Clara David Elena Frank Greta Henry Irene Jonas Karen Leo Maria Nina Oscar "
            "Paula Quentin Rosa Simon Tina Ulrich Vera Walter Xenia Yusuf Zoe Amir Bella Carlos "
            "Diana Emil Fiona Georg Hanna Ivan Julia Kofi Lena Marco Nadia"
        ),
        statements=(
            "My {n} is called {v}.",
            "The name of my {n} is {v}.",
            "Yesterday I met my {n}, who is called {v}.",
            "I should tell you that my {n} is {v}.",
        ),
        questions=(
            "What is my {n} called?",
            "What is the name of my {n}?",
            "Do you remember who my {n} is?",
        ),
        answer="Your {n} is called {v}.",
    ),
    Family(
        name="colour",
        nouns=("car", "bike", "door", "jacket"),
        values=_words(
            "red blue green yellow black white purple orange brown pink grey silver gold turquoise "
            "violet beige crimson cyan magenta ivory"
        ),
        statements=(
            "My {n} is {v}.",
            "The colour of my {n} is {v}.",
            "I painted my {n} and now it is {v}.",
            "You would know my {n} at once because it is {v}.",
        ),
        questions=(
            "What colour is my {n}?",
            "What is the colour of my {n}?",
            "Do you remember the colour of my {n}?",
        ),
        answer="Your {n} is {v}.",
    ),
    Family(
        name="city",
        nouns=("house", "office", "school", "club"),
        values=_words(
            "Oslo Paris Rome Berlin Madrid Lisbon Vienna Prague Dublin Athens Tokyo Delhi Cairo "
            "Lima Quito Boston Denver Dallas Chicago Seattle Toronto Montreal Sydney Perth Zurich "
            "Geneva Milan Naples Porto Seville Helsinki Warsaw Budapest Nairobi Lagos Accra Hanoi "
            "Seoul Osaka Kyoto"
        ),
        statements=(
            "My {n} is in {v}.",
            "You can find my {n} in {v}.",
            "The city where my {n} stands is {v}.",
            "Every day I go to my {n} in {v}.",
        ),
        questions=(
            "Where is my {n}?",
            "In which city is my {n}?",
            "Do you remember where my {n} is?",
        ),
        answer="Your {n} is in {v}.",
    ),
    Family(
        name="meal",
        nouns=("breakfast", "lunch", "dinner"),
        values=_words(
            "soup pasta rice pizza salad curry toast eggs pancakes porridge sushi tacos lentils "
            "beans cheese fish chicken potatoes noodles dumplings lasagna risotto falafel hummus "
            "yogurt cereal stew omelette ramen paella"
        ),
        statements=(
            "For my {n} I have {v}.",
            "My {n} is always {v}.",
            "The best thing for my {n} is {v}.",
            "When it is time for my {n} I like {v}.",
        ),
        questions=(
            "What do I have for my {n}?",
            "What is my {n}?",
            "Do you remember what I like for my {n}?",
        ),
        answer="For your {n} you have {v}.",
    ),
    Family(
        name="job",
        nouns=("mother", "father", "uncle", "cousin"),
        values=_words(
            "baker doctor nurse pilot lawyer farmer painter singer dancer writer builder plumber "
            "tailor barber butcher sailor soldier judge chef waiter librarian chemist dentist "
            "gardener carpenter journalist miner potter driver mechanic"
        ),
        statements=(
            "My {n} works as a {v}.",
            "My {n} is a {v}.",
            "The job of my {n} is {v}.",
            "For many years my {n} has been a {v}.",
        ),
        questions=(
            "What is the job of my {n}?",
            "What does my {n} do for a living?",
            "Do you remember the job of my {n}?",
        ),
        answer="Your {n} is a {v}.",
    ),
    Family(
        name="month",
        nouns=("birthday", "holiday", "exam"),
        values=_words(
            "January February March April May June July August September October November December"
        ),
        statements=(
            "My {n} is in {v}.",
            "The month of my {n} is {v}.",
            "I look forward to my {n} in {v}.",
            "This year my {n} falls in {v}.",
        ),
        questions=(
            "When is my {n}?",
            "In which month is my {n}?",
            "Do you remember when my {n} is?",
        ),
        answer="Your {n} is in {v}.",
    ),
    Family(
        name="code",
        nouns=("locker", "safe", "phone"),
        values=_words(
            "104 118 127 135 149 153 162 176 181 194 203 219 228 237 246 255 264 278 283 291 307 "
            "312 326 339 345 358 361 374 382 396 408 415 423 437 444 459 466 471 489 492 516 524 "
            "538 547 553 569 572 585 593 611 628 634 647 656 663 679 685 691 704 718 725 738 746 "
            "759 767"
        ),
        statements=(
            "The code of my {n} is {v}.",
            "My {n} has the code {v}.",
            "I open my {n} with {v}.",
            "To unlock my {n} you need {v}.",
        ),
        questions=(
            "What is the code of my {n}?",
            "Which code opens my {n}?",
            "Do you remember the code of my {n}?",
        ),
        answer="The code of your {n} is {v}.",
    ),
    Family(
        name="weekday",
        nouns=("lesson", "match"),
        values=_words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
        statements=(
            "My {n} is on {v}.",
            "The day of my {n} is {v}.",
            "I am getting ready for my {n} on {v}.",
            "This week my {n} is on {v}.",
        ),
        questions=(
            "On which day is my {n}?",
            "What is the day of my {n}?",
            "Do you remember the day of my {n}?",
        ),
        answer="Your {n} is on {v}.",
    ),
)

SLOTS = tuple(Slot(family, noun) for family in FAMILIES for noun in family.nouns)

OVERWRITE_MARKERS = (
    "Actually, {s}",
    "Correction: {s}",
    "I was wrong before: {s}",
    "That has changed: {s}",
    "No, wait, {s}",
)

UNKNOWN = "I do not know."

ACKNOWLEDGEMENTS = ("Okay.", "Noted.", "Got it.", "Good to know.")

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You remember what the user tells you.",
    "You are an assistant with a memory.",
)

SMALL_TALK = (
    ("Hello!", "Hello! How can I help?"),
    ("Good morning.", "Good morning!"),
    ("How are you?", "I am fine, thank you."),
    ("Thank you.", "You are welcome."),
    ("Thanks for your help.", "You are welcome."),
    ("The weather is nice today.", "That is good to hear."),
    ("It is raining again.", "Stay dry!"),
    ("I had a long day.", "I hope you can rest."),
    ("I am a little tired.", "I hope you can rest."),
    ("The train was late again.", "That is annoying."),
    ("I lost my umbrella.", "That is annoying."),
    ("I read a good book.", "That is good to hear."),
    ("I went for a walk in the park.", "That is good to hear."),
    ("What can you do?", "I remember what you tell me."),
    ("Who are you?", "I am a small assistant with a memory."),
    ("Can you help me?", "Yes, gladly."),
    ("I need to think about it.", "Take your time."),
    ("Let me see.", "Take your time."),
    ("Someone told me about {v} today.", "That is interesting."),
    ("I saw the word {v} in a book.", "That is interesting."),
)
