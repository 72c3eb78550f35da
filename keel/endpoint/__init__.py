"""The one client of OpenAI-compatible endpoints (``POST .../chat/completions``)."""

from keel.endpoint.answer import Answer as Answer
from keel.endpoint.answer import Token as Token
from keel.endpoint.answer import Unreadable as Unreadable
from keel.endpoint.client import MISSING_BOUND as MISSING_BOUND
from keel.endpoint.client import Endpoint as Endpoint
from keel.endpoint.client import Question as Question
from keel.endpoint.kept import Kept as Kept
from keel.endpoint.kept import key as key
