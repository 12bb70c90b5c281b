"""The ground floor, which everything else imports."""

from utils.environment import prepare

prepare()
