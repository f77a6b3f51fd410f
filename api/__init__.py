"""Rolecall: an async-native Flask auth API with role claims that can be taken back."""
