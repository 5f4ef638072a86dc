//! What can be said, once for people and once for programs.

use serde::Serialize;

/// One line of the log; in JSON, `event` names the kind.
#[derive(Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event<'a> {
    /// A checkpoint is loaded.
    ModelLoaded {
        /// How it is called.
        model: &'a str,
        /// Its fingerprint.
        model_hash: &'a str,
        /// Time it took.
        seconds: f64,
    },
    /// The photo is read, and brought to the model's size.
    Photo {
        /// Its path.
        file: &'a str,
        /// As stored, upright.
        original: [u32; 2],
        /// As the model sees it.
        used: [u32; 2],
    },
    /// A run continues.
    Resumed {
        /// The checkpoint.
        file: &'a str,
        /// Steps already taken.
        step: usize,
    },
    /// A step of the optimiser.
    Step {
        /// Counted from 1; of subjects that stand at different steps, the least.
        step: usize,
        /// Of these.
        train_steps: usize,
        /// How each subject does.
        #[serde(flatten)]
        losses: Losses<'a>,
        /// Time this step took.
        seconds: f64,
        /// Time left at this pace.
        seconds_left: f64,
    },
    /// A step of the sampler.
    Sample {
        /// Counted from 1, over all pictures of the command.
        step: usize,
        /// Of these.
        steps: usize,
        /// Time this step took.
        seconds: f64,
    },
    /// A file is written.
    Wrote {
        /// Its path.
        file: &'a str,
        /// What it is: `checkpoint`, `tail`, `preview`, `picture` or `contact sheet`.
        what: &'a str,
    },
    /// Something the user should know.
    Warning {
        /// What.
        message: String,
    },
    /// Why the command ends.
    Error {
        /// What failed.
        message: &'a str,
        /// What to do about it.
        hint: Option<&'a str>,
        /// The process's exit code.
        exit_code: u8,
    },
    /// The command is done.
    Done {
        /// Time it took.
        seconds: f64,
    },
}

/// What a step says of one subject, or of each in a batch.
#[derive(Serialize)]
#[serde(untagged)]
pub enum Losses<'a> {
    /// The only subject.
    One(Loss),
    /// Subjects of a manifest.
    Batch {
        /// Each by its name.
        subjects: &'a [SubjectLoss<'a>],
    },
}

/// One subject's loss.
#[derive(Clone, Copy, Serialize)]
pub struct Loss {
    /// The timestep drawn.
    pub timestep: usize,
    /// The loss before the tail moved.
    pub loss: f64,
    /// Its running mean.
    pub smoothed_loss: f64,
}

/// One subject of a batch.
#[derive(Serialize)]
pub struct SubjectLoss<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its step, counted from 1.
    pub step: usize,
    /// Its loss.
    #[serde(flatten)]
    pub loss: Loss,
}

impl Losses<'_> {
    /// The running means, for the progress bar.
    fn text(&self) -> String {
        match self {
            Self::One(loss) => format!("loss {:.4}", loss.smoothed_loss),
            Self::Batch { subjects } => {
                let each = subjects.iter().map(|s| format!("{} {:.4}", s.name, s.loss.smoothed_loss));
                format!("loss {}", each.collect::<Vec<_>>().join(", "))
            }
        }
    }
}

impl Event<'_> {
    /// One JSON object.
    pub fn json(&self) -> String {
        serde_json::to_string(self)
            .unwrap_or_else(|error| format!(r#"{{"event":"error","message":"{error}"}}"#))
    }

    /// Whether it is said even when the user asks for quiet.
    pub fn is_warning(&self) -> bool {
        matches!(self, Self::Warning { .. } | Self::Error { .. })
    }

    /// A line for people; none for progress.
    pub fn text(&self) -> Option<String> {
        Some(match self {
            Self::ModelLoaded { model, seconds, .. } => format!("model {model} ({seconds:.1} s)"),
            Self::Photo { file, original: [w, h], used, .. } => {
                let used = if [*w, *h] == *used {
                    String::new()
                } else {
                    format!(", used as {}x{}", used[0], used[1])
                };
                format!("photo {file} ({w}x{h}{used})")
            }
            Self::Resumed { file, step } => format!("continuing after step {step} from {file}"),
            Self::Wrote { file, what } => format!("wrote {what} {file}"),
            Self::Warning { message } => format!("warning: {message}"),
            Self::Error { message, .. } => format!("error: {message}"),
            Self::Done { seconds } => format!("done in {seconds:.1} s"),
            Self::Step { .. } | Self::Sample { .. } => return None,
        })
    }

    /// Position, total, and what else to show beside the bar.
    pub fn progress(&self) -> Option<(usize, usize, String)> {
        match self {
            Self::Step { step, train_steps, losses, seconds, seconds_left } => {
                let (losses, left) = (losses.text(), clock(*seconds_left));
                Some((*step, *train_steps, format!("{losses}  {seconds:.2} s/step  {left} left")))
            }
            &Self::Sample { step, steps, seconds } => {
                let left = clock((steps - step) as f64 * seconds);
                Some((step, steps, format!("{seconds:.2} s/step  {left} left")))
            }
            _ => None,
        }
    }
}

/// `3:07`, or `1:02:33`.
fn clock(seconds: f64) -> String {
    let all = seconds.max(0.0).round() as u64;
    let (hours, minutes, seconds) = (all / 3600, all / 60 % 60, all % 60);
    if hours > 0 { format!("{hours}:{minutes:02}:{seconds:02}") } else { format!("{minutes}:{seconds:02}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_read_as_clocks() {
        assert_eq!([0.4, 187.0, 3753.0].map(clock), ["0:00", "3:07", "1:02:33"]);
    }

    const LOSS: Loss = Loss { timestep: 412, loss: 0.5, smoothed_loss: 0.25 };

    #[test]
    fn a_step_of_a_batch_shows_every_subject() {
        let subject = |name, step| SubjectLoss { name, step, loss: LOSS };
        let losses = Losses::Batch { subjects: &[subject("Max", 4), subject("犬", 3)] };
        let step = Event::Step { step: 3, train_steps: 10, losses, seconds: 2.0, seconds_left: 14.0 };
        assert_eq!(step.progress().unwrap().2, "loss Max 0.2500, 犬 0.2500  2.00 s/step  0:14 left");
        let subject = |name, step| {
            format!(r#"{{"name":"{name}","step":{step},"timestep":412,"loss":0.5,"smoothed_loss":0.25}}"#)
        };
        let json = format!(
            r#"{{"event":"step","step":3,"train_steps":10,"subjects":[{},{}],"seconds":2.0,"seconds_left":14.0}}"#,
            subject("Max", 4),
            subject("犬", 3)
        );
        assert_eq!(step.json(), json);
    }

    #[test]
    fn a_step_is_progress_for_people_and_a_line_for_programs() {
        let step = Event::Step {
            step: 3,
            train_steps: 10,
            losses: Losses::One(LOSS),
            seconds: 2.0,
            seconds_left: 14.0,
        };
        assert!(step.text().is_none());
        assert_eq!(step.progress(), Some((3, 10, "loss 0.2500  2.00 s/step  0:14 left".into())));
        let json = r#"{"event":"step","step":3,"train_steps":10,"timestep":412,"loss":0.5,"smoothed_loss":0.25,"seconds":2.0,"seconds_left":14.0}"#;
        assert_eq!(step.json(), json);
    }
}
