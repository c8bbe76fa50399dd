"""What is installed, what is fast, and what stands in the way: the looks that `headway doctor` takes, by subject.

Each module looks at one subject and returns findings; none of them prints.
"""
