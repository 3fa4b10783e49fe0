"""What eval/diagnosis_monitoring.py is made of: reading logs of many formats, judging the curves, drawing, watching."""
