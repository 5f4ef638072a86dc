//! What is asked of the method: each question is a list of conditions, measured on the same subjects, targets and seeds.

use super::lab::Learning;

/// One row of a table.
#[derive(Debug, Clone, PartialEq)]
pub struct Condition {
    /// Its name in the table.
    pub name: String,
    /// What is put behind the target's sentence.
    pub tail: TailUse,
    /// How the tail was learned.
    pub learning: Learning,
    /// After how many steps.
    pub train_steps: usize,
    /// With which sentence.
    pub caption: SourceCaption,
}

/// What is put behind the target's sentence.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum TailUse {
    /// Nothing: the sentence alone.
    Nothing,
    /// The subject's tail, times this.
    Own(f64),
    /// The next subject's tail, times this.
    Anothers(f64),
    /// Zeros in its place.
    Zero,
}

/// The sentence that a tail is learned with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceCaption {
    /// Species, pose and background, as they are.
    True,
    /// Without the background.
    NoBackground,
    /// With another background.
    WrongBackground,
    /// Without the pose.
    NoPose,
    /// With another pose.
    WrongPose,
}

/// A table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Question {
    /// The autoencoder, and what the model draws from full captions
    Model,
    /// With the tail, without, with another subject's, with zeros
    Tail,
    /// How many tokens
    NHiper,
    /// Steps and learning rate
    Steps,
    /// What the tail is multiplied by
    TailScale,
    /// A source sentence that omits or misnames pose or background
    Caption,
}

impl Question {
    /// How a table is headed.
    pub fn title(self) -> &'static str {
        match self {
            Self::Model => "The model alone",
            Self::Tail => "With and without the tail",
            Self::NHiper => "How many tokens",
            Self::Steps => "Steps and learning rate",
            Self::TailScale => "What the tail is multiplied by",
            Self::Caption => "A source sentence that omits or misnames",
        }
    }

    /// Its rows, around the usual condition `base`; the first has no tail, and is what others are compared with.
    pub fn conditions(self, base: &Condition) -> Vec<Condition> {
        let scale = match base.tail {
            TailUse::Own(scale) | TailUse::Anothers(scale) => scale,
            _ => hiper_core::DEFAULT_TAIL_SCALE,
        };
        let row = |name: &str, tail| Condition { name: name.into(), tail, ..base.clone() };
        let mut rows = vec![row("no tail", TailUse::Nothing)];
        match self {
            Self::Model => rows.clear(),
            Self::Tail => rows.extend([
                row("tail", TailUse::Own(scale)),
                row("another's tail", TailUse::Anothers(scale)),
                row("zero tail", TailUse::Zero),
            ]),
            Self::NHiper => rows.extend([1, 3, 5, 10, 20, 40].map(|n_hiper| Condition {
                learning: Learning { n_hiper, ..base.learning },
                ..row(&format!("N = {n_hiper}"), base.tail)
            })),
            Self::Steps => {
                for learning_rate in [1e-3, 5e-3, 1e-2, 2e-2] {
                    rows.extend([100, 300, 1000].map(|train_steps| Condition {
                        learning: Learning { learning_rate, ..base.learning },
                        train_steps,
                        ..row(&format!("{train_steps} × {learning_rate}"), base.tail)
                    }));
                }
            }
            Self::TailScale => rows.extend(
                [0.4, 0.6, 0.8, 1.0, 1.2].map(|scale| row(&format!("× {scale}"), TailUse::Own(scale))),
            ),
            Self::Caption => {
                let captions = [
                    ("names both", SourceCaption::True),
                    ("no background", SourceCaption::NoBackground),
                    ("wrong background", SourceCaption::WrongBackground),
                    ("no pose", SourceCaption::NoPose),
                    ("wrong pose", SourceCaption::WrongPose),
                ];
                rows.extend(captions.map(|(name, caption)| Condition { caption, ..row(name, base.tail) }));
            }
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::ValueEnum as _;

    fn base() -> Condition {
        Condition {
            name: String::new(),
            tail: TailUse::Own(0.7),
            learning: Learning { n_hiper: 5, learning_rate: 0.01 },
            train_steps: 300,
            caption: SourceCaption::True,
        }
    }

    #[test]
    fn rows_differ_and_start_without_a_tail() {
        for question in Question::value_variants() {
            let rows = question.conditions(&base());
            if *question == Question::Model {
                assert_eq!(rows, []);
                continue;
            }
            assert_eq!(rows[0].tail, TailUse::Nothing);
            for (i, row) in rows.iter().enumerate() {
                let same = |other: &Condition| {
                    other.name == row.name || Condition { name: row.name.clone(), ..other.clone() } == *row
                };
                assert!(!rows[i + 1..].iter().any(same), "{question:?}: {row:?} twice");
            }
        }
    }

    #[test]
    fn the_usual_settings_hold_where_nothing_is_asked() {
        for row in Question::NHiper.conditions(&base()).iter().skip(1) {
            assert_eq!(
                (row.train_steps, row.tail, row.learning.learning_rate),
                (300, TailUse::Own(0.7), 0.01)
            );
        }
    }
}
