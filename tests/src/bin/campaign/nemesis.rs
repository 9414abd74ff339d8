//! Who breaks things: one after the other by the clock, whom by chance.

use std::time::Duration;

use beamline_tests::nats::NatsServer;
use beamline_tests::tcpfault::Mode;
use clap::Args;
use fastrand::Rng;
use tokio::time::Instant;

use crate::crew::Member;
use crate::landed::Landed;

/// How often what breaks, in seconds.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct Rhythm {
    /// `kill -9` of a worker, which is started again at once.
    #[arg(long, default_value_t = 2.0)]
    kill_every: f64,
    /// `kill -9` of the broker; 0: never.
    #[arg(long, default_value_t = 20.0)]
    broker_every: f64,
    /// A pause, a cut, a black hole or a slow network, in rotation, for one worker; 0: never.
    #[arg(long, default_value_t = 0.0)]
    disturb_every: f64,
    /// The longest pause or black hole.
    #[arg(long, default_value_t = 15.0)]
    longest: f64,
}

impl Rhythm {
    /// How long after a final record somebody may still be at it: whoever had begun and was paused, and some time to do it.
    pub(crate) fn at_it(&self) -> Duration {
        let paused = if self.disturb_every > 0.0 { self.longest } else { 0.0 };
        Duration::from_secs_f64(paused) + Duration::from_secs(5)
    }
}

/// What happens next.
#[derive(Clone, Copy, Debug)]
enum Act {
    KillWorker,
    KillBroker,
    ReviveBroker,
    Disturb,
    Heal(usize),
}

/// How one worker is disturbed.
#[derive(Clone, Copy, Debug)]
enum Disturbance {
    Pause,
    Cut,
    BlackHole,
    Delay,
}

/// Everything that can break.
pub(crate) struct Nemesis {
    pub(crate) nats: NatsServer,
    pub(crate) crew: Vec<Member>,
    rhythm: Rhythm,
    rng: Rng,
    acts: Vec<(Instant, Act)>,
    disturbed: usize,
    broker_is_away: bool,
    landed: Landed,
}

impl Nemesis {
    /// It breaks these, and writes down what it broke.
    pub(crate) fn new(nats: NatsServer, crew: Vec<Member>, rhythm: Rhythm, seed: u64, landed: Landed) -> Self {
        let rng = Rng::with_seed(seed);
        let mut nemesis =
            Self { nats, crew, rhythm, rng, acts: Vec::new(), disturbed: 0, broker_is_away: false, landed };
        let periods = [
            (Act::KillWorker, rhythm.kill_every),
            (Act::KillBroker, rhythm.broker_every),
            (Act::Disturb, rhythm.disturb_every),
        ];
        for (act, period) in periods {
            nemesis.plan(act, period);
        }
        nemesis
    }

    /// Breaks one thing after the other; it never ends by itself.
    pub(crate) async fn rage(&mut self) {
        while let Some(next) = (0..self.acts.len()).min_by_key(|index| self.acts.get(*index).map(|(at, _)| *at)) {
            let (at, act) = self.acts.get(next).copied().unwrap_or((Instant::now(), Act::KillWorker));
            tokio::time::sleep_until(at).await;
            self.acts.swap_remove(next);
            tokio::task::block_in_place(|| self.act(act));
        }
        std::future::pending::<()>().await;
    }

    /// Mends everything that is broken.
    pub(crate) fn relent(&mut self) {
        self.acts.clear();
        if self.broker_is_away {
            self.act(Act::ReviveBroker);
        }
        for index in 0..self.crew.len() {
            self.act(Act::Heal(index));
        }
        self.landed.end();
    }

    fn act(&mut self, act: Act) {
        match act {
            Act::KillWorker => {
                self.plan(act, self.rhythm.kill_every);
                let victim = self.rng.usize(..self.crew.len());
                self.kill(victim);
            }
            Act::KillBroker => {
                self.plan(act, self.rhythm.broker_every);
                self.nats.kill();
                self.broker_is_away = true;
                let away = self.rng.f64();
                self.plan(Act::ReviveBroker, away);
                self.landed.note("broker-kill");
            }
            Act::ReviveBroker => {
                self.nats.restart();
                self.broker_is_away = false;
            }
            Act::Disturb => {
                self.plan(act, self.rhythm.disturb_every);
                let victim = self.rng.usize(..self.crew.len());
                self.disturb(victim);
            }
            Act::Heal(index) => {
                if let Some(member) = self.crew.get_mut(index) {
                    member.network.set(Mode::Pass);
                    if member.worker.is_running() {
                        member.worker.resume();
                    }
                }
            }
        }
    }

    fn kill(&mut self, victim: usize) {
        let Some(member) = self.crew.get_mut(victim) else { return };
        // Whoever has ended by itself was not killed: the auditor sees what became of its work, and the count is lower.
        let has_landed = member.worker.is_running();
        member.worker.kill();
        member.restart();
        let name = member.name().to_owned();
        self.landed.note(&format!("{} {name}", if has_landed { "worker-kill" } else { "worker-had-ended" }));
    }

    fn disturb(&mut self, victim: usize) {
        const ALL: [Disturbance; 4] =
            [Disturbance::Pause, Disturbance::Cut, Disturbance::BlackHole, Disturbance::Delay];
        let disturbance = ALL.get(self.disturbed % ALL.len()).copied().unwrap_or(Disturbance::Pause);
        self.disturbed += 1;
        let long = 1.0 + self.rng.f64() * (self.rhythm.longest - 1.0).max(0.0);
        let Some(member) = self.crew.get_mut(victim) else { return };
        if !member.worker.is_running() {
            return;
        }
        let (word, seconds) = match disturbance {
            Disturbance::Pause => {
                member.worker.pause();
                ("pause", long)
            }
            Disturbance::Cut => {
                member.network.set(Mode::Cut);
                ("cut", long.min(2.0))
            }
            Disturbance::BlackHole => {
                member.network.set(Mode::BlackHole);
                ("black-hole", long)
            }
            Disturbance::Delay => {
                member.network.set(Mode::Delay(Duration::from_millis(100)));
                ("delay", long)
            }
        };
        let name = member.name().to_owned();
        self.acts.push((Instant::now() + Duration::from_secs_f64(seconds), Act::Heal(victim)));
        self.landed.note(&format!("{word} {name} {seconds:.1}"));
    }

    /// After this time, a tenth more or less; a period of 0 is never.
    fn plan(&mut self, act: Act, seconds: f64) {
        if seconds > 0.0 {
            let seconds = seconds * (0.9 + 0.2 * self.rng.f64());
            self.acts.push((Instant::now() + Duration::from_secs_f64(seconds), act));
        }
    }
}
