//! Conditions, carried out on subjects.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use candle_core::Tensor;
use hiper_core::HiperEmbedding;
use image::RgbImage;

use super::captions;
use super::lab::{Lab, Learning, Lesson, Request};
use super::measures::{self, Figures};
use super::questions::{Condition, SourceCaption, TailUse};
use super::readers::{self, Readers};
use super::subject::{Place, Subject};
use crate::scenes::{Background, Pose};

/// What a table is measured on, and how.
pub struct Experiment<'a> {
    /// The model.
    pub lab: &'a Lab,
    /// The readers.
    pub readers: &'a Readers,
    /// The subjects.
    pub subjects: &'a [Subject],
    /// Pictures a target, each from its own noise.
    pub samples: u64,
    /// Guidance of edits.
    pub guidance_scale: f64,
    /// Guidance of reconstructions.
    pub reconstruction_guidance_scale: f64,
}

/// One drawn picture and its figures.
pub struct Drawn {
    /// The subject's seed.
    pub subject: u64,
    /// Which target, and which sample of it; `None` for a reconstruction.
    pub target: Option<(usize, u64)>,
    /// The picture.
    pub picture: RgbImage,
    /// Its figures.
    pub figures: Figures,
}

/// A row's pictures.
pub struct Row {
    /// The condition.
    pub condition: Condition,
    /// Its pictures.
    pub drawn: Vec<Drawn>,
}

/// Lessons that share a pass of the network.
const LESSONS_AT_ONCE: usize = 8;

/// Tails of a subject that are learned alike but for the number of steps.
struct Run {
    learning: Learning,
    caption: SourceCaption,
    tails: BTreeMap<usize, HiperEmbedding>,
}

impl Experiment<'_> {
    /// Measures every condition; `progress` is told what is being done.
    ///
    /// # Errors
    /// When a setting does not fit the model.
    pub fn measure(&self, conditions: &[Condition], progress: &mut dyn FnMut(String)) -> Result<Vec<Row>> {
        let runs = self.learn(conditions, progress)?;
        conditions
            .iter()
            .map(|condition| {
                progress(format!("drawing: {}", condition.name));
                let mut drawn = vec![];
                for (i, subject) in self.subjects.iter().enumerate() {
                    let another = &runs[(i + 1) % runs.len()];
                    drawn.extend(self.draw(subject, condition, &runs[i], another)?);
                }
                Ok(Row { condition: condition.clone(), drawn })
            })
            .collect()
    }

    /// Each subject's runs, as the conditions want them.
    fn learn(&self, conditions: &[Condition], progress: &mut dyn FnMut(String)) -> Result<Vec<Vec<Run>>> {
        let mut wanted: Vec<(Learning, SourceCaption, Vec<usize>)> = vec![];
        for condition in
            conditions.iter().filter(|c| matches!(c.tail, TailUse::Own(_) | TailUse::Anothers(_)))
        {
            let key = (condition.learning, condition.caption);
            match wanted.iter_mut().find(|w| (w.0, w.1) == key) {
                Some((.., marks)) if marks.contains(&condition.train_steps) => {}
                Some((.., marks)) => marks.push(condition.train_steps),
                None => wanted.push((key.0, key.1, vec![condition.train_steps])),
            }
        }
        // Tails of a length lie next to each other, and can share a pass.
        wanted.sort_by_key(|(learning, ..)| learning.n_hiper);
        let mut runs: Vec<Vec<Run>> = self.subjects.iter().map(|_| vec![]).collect();
        let places: Vec<_> = wanted
            .iter()
            .flat_map(|run| (0..self.subjects.len()).map(move |subject| (subject, run)))
            .collect();
        for alike in places.chunk_by(|(_, a), (_, b)| a.0.n_hiper == b.0.n_hiper) {
            for (i, places) in alike.chunks(LESSONS_AT_ONCE).enumerate() {
                let n_hiper = places[0].1.0.n_hiper;
                progress(format!("learning {n_hiper} tokens: {} of {}", i * LESSONS_AT_ONCE, alike.len()));
                let lessons: Vec<_> = places.iter().map(|(i, run)| self.lesson(*i, run)).collect();
                for ((subject, run), tails) in places.iter().zip(self.lab.personalise(&lessons)?) {
                    let (learning, caption, marks) = (run.0, run.1, run.2.iter().copied());
                    runs[*subject].push(Run { learning, caption, tails: marks.zip(tails).collect() });
                }
            }
        }
        Ok(runs)
    }

    fn lesson(&self, subject: usize, run: &(Learning, SourceCaption, Vec<usize>)) -> Lesson<'_> {
        let subject = &self.subjects[subject];
        let (learning, caption, marks) = run;
        Lesson {
            picture: &subject.source.picture,
            caption: source_text(subject, *caption),
            learning: *learning,
            marks: marks.clone(),
            seed: subject.seed,
        }
    }

    fn draw(
        &self,
        subject: &Subject,
        condition: &Condition,
        own: &[Run],
        another: &[Run],
    ) -> Result<Vec<Drawn>> {
        let find = |runs: &[Run]| -> Result<HiperEmbedding> {
            let run =
                runs.iter().find(|r| r.learning == condition.learning && r.caption == condition.caption);
            Ok(run
                .and_then(|r| r.tails.get(&condition.train_steps))
                .context("a tail that was not learned")?
                .clone())
        };
        let tail = match condition.tail {
            TailUse::Nothing => None,
            TailUse::Own(scale) => Some((find(own)?, scale)),
            TailUse::Anothers(scale) => Some((find(another)?, scale)),
            TailUse::Zero => Some((self.zeros(condition.learning.n_hiper)?, 1.0)),
        };
        let tail = tail.as_ref().map(|(tail, scale)| (tail, *scale));
        let who = &subject.identity;
        let caption = |target: &Place| captions::short(who, Some(target.pose), Some(target.background));
        let places: Vec<_> =
            (0..).zip(&subject.targets).map(|(i, target)| (i, target, caption(target))).collect();
        let all = || places.iter().flat_map(|place| (0..self.samples).map(move |sample| (place, sample)));
        let requests: Vec<_> = all().map(|((.., caption), seed)| Request { caption, tail, seed }).collect();
        let mut drawn = vec![];
        for (((index, target, _), sample), picture) in
            all().zip(self.lab.draw(&requests, self.guidance_scale)?)
        {
            let figures = self.figures(subject, target, &picture)?;
            drawn.push(Drawn { subject: subject.seed, target: Some((*index, sample)), picture, figures });
        }
        if let TailUse::Own(_) = condition.tail {
            drawn.push(self.reconstruct(subject, condition, &find(own)?)?);
        }
        Ok(drawn)
    }

    /// The source again, from its own sentence and the unscaled tail.
    fn reconstruct(&self, subject: &Subject, condition: &Condition, tail: &HiperEmbedding) -> Result<Drawn> {
        let caption = source_text(subject, condition.caption);
        let request = Request { caption: &caption, tail: Some((tail, 1.0)), seed: 0 };
        let picture = self
            .lab
            .draw(&[request], self.reconstruction_guidance_scale)?
            .pop()
            .context("no picture was drawn")?;
        let source = &subject.source.picture;
        let figures = Figures::from([
            ("psnr", measures::psnr(&picture, source)),
            ("psnr_to_vae", measures::psnr(&picture, &self.lab.through_vae(source)?)),
        ]);
        Ok(Drawn { subject: subject.seed, target: None, picture, figures })
    }

    /// The figures of a picture that should show `place`.
    ///
    /// # Errors
    /// When it has another size than the readers read.
    pub fn figures(&self, subject: &Subject, place: &Place, picture: &RgbImage) -> Result<Figures> {
        let truth = readers::truth(&subject.identity, place.pose, place.background);
        let mut figures = measures::right(&self.readers.read(picture)?, &truth);
        figures.extend(
            measures::coat_error(picture, &place.coat, subject.identity.body)
                .map(|error| ("coat_error", error)),
        );
        Ok(figures)
    }

    fn zeros(&self, n_hiper: usize) -> Result<HiperEmbedding> {
        let text = self.lab.embed("")?;
        Ok(HiperEmbedding::new(Tensor::zeros(
            (n_hiper, text.width()),
            candle_core::DType::F32,
            &candle_core::Device::Cpu,
        )?)?)
    }
}

/// The sentence that `subject`'s tail is learned with.
fn source_text(subject: &Subject, caption: SourceCaption) -> String {
    let (pose, background) = (subject.source.pose, subject.source.background);
    // Neither the source's own nor the first targets', whose neighbours they are.
    let wrong_pose = Pose::ALL[(pose as usize + 2) % Pose::ALL.len()];
    let wrong_background = Background::ALL[(background as usize + 3) % Background::ALL.len()];
    let (pose, background) = match caption {
        SourceCaption::True => (Some(pose), Some(background)),
        SourceCaption::NoBackground => (Some(pose), None),
        SourceCaption::WrongBackground => (Some(pose), Some(wrong_background)),
        SourceCaption::NoPose => (None, Some(background)),
        SourceCaption::WrongPose => (Some(wrong_pose), Some(background)),
    };
    captions::short(&subject.identity, pose, background)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caption_omits_or_misnames_what_it_says() {
        let subject = Subject::of_seed(11, 1, 32).unwrap();
        let (pose, background) = (subject.source.pose.word(), subject.source.background.phrase());
        let names = |caption| {
            let text = source_text(&subject, caption);
            (text.contains(pose), text.contains(background), text.split(' ').count())
        };
        let (true_pose, true_background, words) = names(SourceCaption::True);
        assert!(true_pose && true_background);
        assert_eq!(
            (names(SourceCaption::NoBackground).0, names(SourceCaption::NoBackground).1),
            (true, false)
        );
        assert_eq!(
            (names(SourceCaption::WrongBackground).0, names(SourceCaption::WrongBackground).1),
            (true, false)
        );
        assert_eq!(names(SourceCaption::NoPose), (false, true, words - 1));
        assert_eq!(names(SourceCaption::WrongPose), (false, true, words));
    }
}
