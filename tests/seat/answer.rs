//! What came of an effect that was tried.

use nix::errno::Errno;

/// What a call came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// It did what it was asked for.
    Done(u64),
    /// The kernel has refused it.
    Refused(Errno),
    /// The filter of the process has trapped it, which would have ended the process.
    Trapped,
    /// No number of its PID namespace stands for the other process.
    Unseen,
    /// The call was made, and nothing came of it.
    Nothing,
    /// It has nothing to try this with, or is itself the one that it would be done to.
    NotHere,
}

impl Answer {
    /// As the table has it.
    pub fn word(self) -> String {
        match self {
            Answer::Done(_) => "allowed".to_owned(),
            Answer::Refused(errno) => format!("{errno:?}"),
            Answer::Trapped => "trap".to_owned(),
            Answer::Unseen => "unseen".to_owned(),
            Answer::Nothing => "nothing".to_owned(),
            Answer::NotHere => "–".to_owned(),
        }
    }

    /// An error that the kernel finds only after it has allowed the call, for a call whose arguments are
    /// wrong on purpose.
    pub fn past(self, errno: Errno) -> Answer {
        if self == Answer::Refused(errno) { Answer::Done(0) } else { self }
    }

    /// What it returned.
    pub fn value(self) -> Option<u64> {
        match self {
            Answer::Done(value) => Some(value),
            _ => None,
        }
    }
}

/// Several answers in one cell: one word if all are the same, else each with what was tried.
pub fn together(answers: &[(String, Answer)]) -> String {
    let mut words: Vec<(String, Vec<&str>)> = Vec::new();
    for (what, answer) in answers.iter().filter(|(_, answer)| *answer != Answer::NotHere) {
        let word = answer.word();
        match words.iter_mut().find(|(other, _)| *other == word) {
            Some((_, all)) => all.push(what),
            None => words.push((word, vec![what])),
        }
    }
    match &words[..] {
        [] => Answer::NotHere.word(),
        [(word, _)] => word.clone(),
        _ => {
            let parts = words.iter().map(|(word, all)| format!("{word} ({})", all.join(", ")));
            parts.collect::<Vec<_>>().join("; ")
        }
    }
}
