"""Ordinary clients, changed in nothing but `extra_body`, hold conversations with tool calls.

They send their full history each turn, as they always do, and the server folds it.
"""

import asyncio
import itertools
import json
from collections.abc import Callable
from typing import Any, Literal

import openai
import pytest
from langchain_core.messages import BaseMessage, HumanMessage, SystemMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic_ai import Agent, ModelSettings, RunContext
from pydantic_ai.messages import ModelMessage
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from deltamem_vllm.sessions import open_store
from tests.api.server import MODEL, Server
from tests.api.sessions_http import new_name, record_of
from tests.api.tool_chats import NO_WHITE_SPACE, WORDS, Exchange, Recorder, check_folded
from tests.oracle import Oracle

WINDOW = 2
SYSTEM = "You know the weather."
QUESTIONS = {
    "Good morning.": False,
    "Is it warm?": True,
    "Do I need a coat?": False,
    "And over there?": True,
    "Thank you.": False,
}
"""And whether the answer takes a call of the tool."""

MAX_TOKENS = 150
City = Literal["Rome", "Oslo"]


def weather(city: City) -> str:
    """The weather in a city."""
    return f"It is warm in {city}."


def talk_with_openai(
    url: str, recorder: Recorder, extra_body: dict[str, Any], stream: bool
) -> None:
    """OpenAI's client, and a loop as in its guide to function calling."""
    definition: Any = {
        "type": "function",
        "function": {
            "name": "weather",
            "description": weather.__doc__,
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    client = openai.OpenAI(
        base_url=url, api_key="none", max_retries=0, http_client=recorder.client()
    )
    history: list[Any] = [{"role": "system", "content": SYSTEM}]

    def answer(tool_choice: Any, **extra: Any) -> Any:
        arguments: dict[str, Any] = {
            "model": MODEL,
            "messages": history,
            "tools": [definition],
            "tool_choice": tool_choice,
            "parallel_tool_calls": False,
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "logit_bias": NO_WHITE_SPACE,
            "extra_body": extra_body | extra,
        }
        if stream:
            with client.chat.completions.stream(**arguments) as events:
                completion: Any = events.until_done().get_final_completion()
        else:
            completion = client.chat.completions.create(**arguments)
        history.append(completion.choices[0].message)
        return completion.choices[0].message

    for question, takes_tool in QUESTIONS.items():
        history.append({"role": "user", "content": question})
        if takes_tool:
            (call,) = answer({"type": "function", "function": {"name": "weather"}}).tool_calls
            arguments = json.loads(call.function.arguments)
            result = {"role": "tool", "tool_call_id": call.id, "content": weather(**arguments)}
            history.append(result)
        assert answer("none", **WORDS).content


def talk_with_langchain(
    url: str, recorder: Recorder, extra_body: dict[str, Any], stream: bool
) -> None:
    """LangChain's `ChatOpenAI` with a bound tool."""
    weather_tool = tool(weather)
    model = ChatOpenAI(
        model=MODEL,
        base_url=url,
        api_key="none",
        max_retries=0,
        max_tokens=MAX_TOKENS,
        temperature=0,
        logit_bias=NO_WHITE_SPACE,
        http_client=recorder.client(),
    )
    history: list[BaseMessage] = [SystemMessage(SYSTEM)]

    def answer(tool_choice: str, **extra: Any) -> Any:
        bound = model.bind_tools(
            [weather_tool], tool_choice=tool_choice, strict=True, parallel_tool_calls=False
        ).bind(extra_body=extra_body | extra)
        if stream:
            first, *others = bound.stream(history)
            message = sum(others, first)
        else:
            message = bound.invoke(history)
        history.append(message)
        return message

    for question, takes_tool in QUESTIONS.items():
        history.append(HumanMessage(question))
        if takes_tool:
            (call,) = answer("required").tool_calls
            history.append(weather_tool.invoke(call))
        assert answer("none", **WORDS).content


def talk_with_pydantic_ai(
    url: str, recorder: Recorder, extra_body: dict[str, Any], stream: bool
) -> None:
    """An agent of pydantic-ai, which calls its tool by itself."""
    asyncio.run(_talk_with_agent(url, recorder, extra_body, stream))


async def _talk_with_agent(
    url: str, recorder: Recorder, extra_body: dict[str, Any], stream: bool
) -> None:
    def settings(context: RunContext[bool]) -> ModelSettings:
        calls = context.deps and context.run_step == 1
        return ModelSettings(
            max_tokens=MAX_TOKENS,
            temperature=0,
            parallel_tool_calls=False,
            logit_bias=NO_WHITE_SPACE,
            tool_choice="required" if calls else "none",
            extra_body=extra_body if calls else extra_body | WORDS,
        )

    async with recorder.async_client() as http_client:
        client = openai.AsyncOpenAI(
            base_url=url, api_key="none", max_retries=0, http_client=http_client
        )
        agent = Agent(
            OpenAIChatModel(MODEL, provider=OpenAIProvider(openai_client=client)),
            deps_type=bool,
            instructions=SYSTEM,
            model_settings=settings,
        )
        agent.tool_plain(strict=True)(weather)
        history: list[ModelMessage] = []
        for question, takes_tool in QUESTIONS.items():
            if stream:
                async with agent.run_stream(
                    question, deps=takes_tool, message_history=history
                ) as run:
                    assert await run.get_output()
                    history = run.all_messages()
            else:
                result = await agent.run(question, deps=takes_tool, message_history=history)
                assert result.output
                history = result.all_messages()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("talk", [talk_with_openai, talk_with_langchain, talk_with_pydantic_ai])
def test_client_that_sends_its_full_history_is_folded(
    tool_server: Server,
    oracle: Oracle,
    talk: Callable[[str, Recorder, dict[str, Any], bool], None],
    stream: bool,
) -> None:
    session, recorder = new_name(), Recorder()
    memory = {"session": session, "window": {"messages": WINDOW}}
    talk(f"{tool_server.url}/v1", recorder, {"memory": memory, "return_token_ids": True}, stream)
    exchanges = recorder.exchanges
    assert [bool(one.request.get("stream")) for one in exchanges] == [stream] * len(exchanges)
    check_conversation(exchanges)
    assert tool_server.store is not None
    with open_store(tool_server.store) as store:
        records = [record_of(store, session, version + 1) for version in range(len(exchanges))]
    check_folded(exchanges, records, oracle, WINDOW)


def check_conversation(exchanges: list[Exchange]) -> None:
    """Five questions, two of which took a call, in histories that only grew."""
    histories = [one.request["messages"] for one in exchanges]
    assert len(histories) == len(QUESTIONS) + sum(QUESTIONS.values())
    for before, after in itertools.pairwise(histories):
        assert after[: len(before)] == before
    roles = [message["role"] for message in histories[-1]]
    assert roles.count("user") == len(QUESTIONS)
    assert roles.count("tool") == sum(map(bool, QUESTIONS.values()))
    reports = [one.reply.memory or {} for one in exchanges]
    assert [report["version"] for report in reports] == [*range(1, len(reports) + 1)]
    saved = [report["prompt_tokens_saved"] for report in reports]
    assert saved == sorted(saved)
    assert saved[-1] > saved[len(saved) // 2] > saved[0] == 0
