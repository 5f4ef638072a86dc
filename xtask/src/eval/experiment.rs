//! Conditions, carried out on subjects.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use candle_core::Tensor;
use hiper_core::HiperEmbedding;
use image::RgbImage;

use super::captions;
use super::lab::{Lab, Learning, Request};
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
        let runs = self
            .subjects
            .iter()
            .enumerate()
            .map(|(i, subject)| {
                progress(format!("learning subject {} of {}", i + 1, self.subjects.len()));
                self.learn(subject, conditions)
            })
            .collect::<Result<Vec<_>>>()?;
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

    fn learn(&self, subject: &Subject, conditions: &[Condition]) -> Result<Vec<Run>> {
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
        let learn = |(learning, caption, marks): (Learning, SourceCaption, Vec<usize>)| {
            let (text, picture) = (source_text(subject, caption), &subject.source.picture);
            let tails = self.lab.personalise(picture, &text, learning, &marks, subject.seed)?;
            Ok(Run { learning, caption, tails: marks.into_iter().zip(tails).collect() })
        };
        wanted.into_iter().map(learn).collect()
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
