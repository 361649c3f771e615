//! One stream between a host program and the guest: its states, its flow control, what it owes the guest.
//!
//! virtio 1.3, sections 5.10.6.3 (buffer space management) and 5.10.6.6 (stream sockets). Pure: must not
//! touch sockets, queues or the bytes themselves. Every connection is opened by the host.

use super::packet::{Credit, Header, Op, Packet, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// Bytes that the guest may send before the host program has taken any, for each connection at the most.
pub(super) const BUFFER_BYTES: u32 = 256 * 1024;
/// The guest is told of free space when this part of the buffer is news. A writer that waits for space is always
/// woken, because the news reach this size before the buffer is empty.
const CREDIT_NEWS_PART: u32 = 4;

/// Where a connection stands. The end of a connection is its removal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The guest has not been asked yet.
    Wanted,
    /// The guest has been asked and has not answered.
    Requested,
    /// The guest accepted.
    Established,
}

/// Whether a credit update is due although nothing else has to be said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    /// Only when there is enough news.
    NotAsked,
    /// The guest asked.
    Due,
}

/// Whether the guest has been asked for credit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Question {
    /// There is credit.
    Needless,
    /// There is none, and the guest does not know that this matters.
    Due,
    /// There is none, and the guest was asked.
    Asked,
}

/// What the owner of the connection has to do after a packet of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    /// Look at what the connection owes; nothing else.
    Proceed,
    /// Tell the host program that the connection stands.
    Establish,
    /// Pass the packet's payload on to the host program, in order.
    Deliver,
    /// The guest takes no more data: the host program must not write any more.
    RefuseWrites,
    /// The guest is done in both directions: answer with a reset, write out what is buffered, and close.
    Finish,
    /// The guest has ended the connection already: write out what is buffered, and close.
    Finished,
    /// The guest aborted or refused the connection: close at once.
    Abort,
    /// The guest broke the protocol: answer with a reset, and close at once.
    Violation,
}

/// How much the host program closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HostEnd {
    /// It sends no more, but may receive.
    Sending,
    /// It receives no more, but may have sent what is not read yet.
    Receiving,
    /// It neither sends nor receives any more.
    Both,
}

/// A stream, named by its two ports.
#[derive(Debug)]
pub(super) struct Connection {
    guest_cid: u64,
    guest_port: u32,
    host_port: u32,
    /// Bytes that the guest may send before the host program has taken any.
    buffer_bytes: u32,
    state: State,
    /// Directions that the host program ended: SHUTDOWN bits, seen from the host.
    host_ended: u32,
    /// Those of `host_ended` that the guest was told.
    told_ended: u32,
    /// Directions that the guest ended: SHUTDOWN bits, seen from the guest.
    guest_ended: u32,
    /// What the guest last said of its buffer.
    guest: Credit,
    /// Bytes sent to the guest, modulo 2^32.
    sent: u32,
    /// Bytes received from the guest, modulo 2^32.
    received: u32,
    /// Those that the host program's socket took, or that nobody wants any more.
    forwarded: u32,
    /// The value of `forwarded` that the guest knows.
    reported: u32,
    answer: Answer,
    question: Question,
}

impl Connection {
    /// A connection that the guest is yet to be asked for, with a buffer of [`BUFFER_BYTES`] or fewer.
    pub(super) fn new(guest_cid: u64, guest_port: u32, host_port: u32, buffer_bytes: u32) -> Self {
        Self {
            guest_cid,
            guest_port,
            host_port,
            buffer_bytes: buffer_bytes.min(BUFFER_BYTES),
            state: State::Wanted,
            host_ended: 0,
            told_ended: 0,
            guest_ended: 0,
            guest: Credit::default(),
            sent: 0,
            received: 0,
            forwarded: 0,
            reported: 0,
            answer: Answer::NotAsked,
            question: Question::Needless,
        }
    }

    /// Whether a packet from this port of the guest belongs to the connection.
    pub(super) fn is_with(&self, guest_port: u32) -> bool {
        self.guest_port == guest_port
    }

    /// Whether the guest has heard of the connection.
    pub(super) fn is_known(&self) -> bool {
        self.state != State::Wanted
    }

    /// Whether the guest has accepted.
    pub(super) fn is_established(&self) -> bool {
        self.state == State::Established
    }

    /// Takes a packet that belongs to the connection.
    pub(super) fn receive(&mut self, packet: &Packet) -> Effect {
        self.guest = packet.credit;
        if self.question != Question::Needless && self.credit() > 0 {
            self.question = Question::Needless;
        }
        match (self.state, packet.op) {
            (State::Requested, Op::Response) => {
                self.state = State::Established;
                Effect::Establish
            }
            (State::Established, Op::Data) => self.receive_data(packet.len),
            (State::Established, Op::Shutdown) => self.receive_shutdown(packet.flags),
            (State::Established, Op::CreditUpdate) => Effect::Proceed,
            (State::Established, Op::CreditRequest) => {
                self.answer = Answer::Due;
                Effect::Proceed
            }
            // A guest's kernel may give up waiting for the end of a connection whose data it has sent.
            (State::Established, Op::Reset) if self.guest_ended & SHUTDOWN_SEND != 0 => {
                Effect::Finished
            }
            (_, Op::Reset) => Effect::Abort,
            (State::Wanted | State::Requested | State::Established, _) => Effect::Violation,
        }
    }

    fn receive_data(&mut self, len: u32) -> Effect {
        let fits = self
            .buffered()
            .checked_add(len)
            .is_some_and(|total| total <= self.buffer_bytes);
        if !fits || self.guest_ended & SHUTDOWN_SEND != 0 {
            return Effect::Violation;
        }
        self.received = self.received.wrapping_add(len);
        if self.host_ended & SHUTDOWN_RECEIVE != 0 {
            // Sent before the guest learned that nobody reads.
            self.forwarded = self.received;
            return Effect::Proceed;
        }
        Effect::Deliver
    }

    fn receive_shutdown(&mut self, flags: u32) -> Effect {
        self.guest_ended |= flags & SHUTDOWN_BOTH;
        match self.guest_ended {
            SHUTDOWN_BOTH => Effect::Finish,
            SHUTDOWN_RECEIVE => Effect::RefuseWrites,
            _ => Effect::Proceed,
        }
    }

    /// Bytes that may be read from the host program now, to be sent to the guest.
    pub(super) fn sendable(&self) -> u32 {
        if self.is_silent() || self.state != State::Established {
            return 0;
        }
        self.credit()
    }

    /// Free space in the guest's buffer. A guest that counts wrongly gets nothing.
    fn credit(&self) -> u32 {
        let in_flight = self.sent.wrapping_sub(self.guest.fwd_cnt);
        self.guest.buf_alloc.saturating_sub(in_flight)
    }

    /// Bytes of the guest that the host program has not taken yet.
    pub(super) fn buffered(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    /// The host program's socket took so many bytes of those that are buffered.
    pub(super) fn forward(&mut self, bytes: u32) {
        self.forwarded = self.forwarded.wrapping_add(bytes.min(self.buffered()));
    }

    /// The host program ended one direction or both. Data that it has not taken is forgotten when it
    /// takes no more.
    pub(super) fn end_by_host(&mut self, end: HostEnd) {
        self.host_ended |= match end {
            HostEnd::Sending => SHUTDOWN_SEND,
            HostEnd::Receiving => SHUTDOWN_RECEIVE,
            HostEnd::Both => SHUTDOWN_BOTH,
        };
        if self.host_ended & SHUTDOWN_RECEIVE != 0 {
            self.forwarded = self.received;
        }
    }

    /// Whether the guest has sent all it ever will and the host program has taken it.
    pub(super) fn is_drained(&self) -> bool {
        self.guest_ended & SHUTDOWN_SEND != 0 && self.buffered() == 0
    }

    /// Whether nothing more can come from the host program: it said so, or the guest takes nothing.
    pub(super) fn is_silent(&self) -> bool {
        self.host_ended & SHUTDOWN_SEND != 0 || self.guest_ended & SHUTDOWN_RECEIVE != 0
    }

    /// Whether nothing more can pass between the host program and the connection.
    pub(super) fn is_over_for_host(&self) -> bool {
        let takes_nothing = self.is_drained() || self.host_ended & SHUTDOWN_RECEIVE != 0;
        takes_nothing && self.is_silent()
    }

    /// Whether [`Self::next_control`] has something to say.
    pub(super) fn owes_control(&self) -> bool {
        match self.state {
            State::Wanted => true,
            State::Requested => false,
            State::Established => {
                self.host_ended != self.told_ended
                    || self.question == Question::Due
                    || self.answer == Answer::Due
                    || self.has_credit_news()
            }
        }
    }

    /// Free space is news while the guest can still send.
    fn has_credit_news(&self) -> bool {
        self.guest_ended & SHUTDOWN_SEND == 0
            && self.host_ended & SHUTDOWN_RECEIVE == 0
            && self.forwarded.wrapping_sub(self.reported) >= self.buffer_bytes / CREDIT_NEWS_PART
    }

    /// The next packet without payload that is due to the guest.
    pub(super) fn next_control(&mut self) -> Option<Header> {
        match self.state {
            State::Wanted => {
                self.state = State::Requested;
                Some(self.header(Op::Request))
            }
            State::Requested => None,
            State::Established if self.host_ended != self.told_ended => {
                self.told_ended = self.host_ended;
                Some(Header {
                    flags: self.host_ended,
                    ..self.header(Op::Shutdown)
                })
            }
            State::Established if self.question == Question::Due => {
                self.question = Question::Asked;
                Some(self.header(Op::CreditRequest))
            }
            State::Established if self.answer == Answer::Due || self.has_credit_news() => {
                Some(self.header(Op::CreditUpdate))
            }
            State::Established => None,
        }
    }

    /// The header for `len` bytes of payload, at most [`Self::sendable`].
    pub(super) fn data(&mut self, len: u32) -> Header {
        self.sent = self.sent.wrapping_add(len);
        if self.credit() == 0 && self.question == Question::Needless {
            self.question = Question::Due;
        }
        Header {
            len,
            ..self.header(Op::Data)
        }
    }

    /// The reset that ends the connection.
    pub(super) fn reset(&mut self) -> Header {
        self.header(Op::Reset)
    }

    /// Every packet carries the news about the host's buffer.
    fn header(&mut self, op: Op) -> Header {
        self.reported = self.forwarded;
        self.answer = Answer::NotAsked;
        Header {
            credit: Credit {
                buf_alloc: self.buffer_bytes,
                fwd_cnt: self.forwarded,
            },
            ..Header::to_guest(self.guest_cid, self.host_port, self.guest_port, op)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CREDIT_NEWS_BYTES: u32 = BUFFER_BYTES / CREDIT_NEWS_PART;
    const GUEST_BUFFER: u32 = 1000;

    fn packet(op: Op) -> Packet {
        Packet {
            guest_port: 1024,
            host_port: 7,
            op,
            flags: 0,
            len: 0,
            credit: Credit {
                buf_alloc: GUEST_BUFFER,
                fwd_cnt: 0,
            },
        }
    }

    fn data(len: u32) -> Packet {
        Packet {
            len,
            ..packet(Op::Data)
        }
    }

    fn shutdown(flags: u32) -> Packet {
        Packet {
            flags,
            ..packet(Op::Shutdown)
        }
    }

    fn established() -> Connection {
        let mut connection = Connection::new(3, 1024, 7, BUFFER_BYTES);
        assert_eq!(connection.next_control().unwrap().op, 1);
        assert_eq!(connection.receive(&packet(Op::Response)), Effect::Establish);
        connection
    }

    #[test]
    fn an_answer_before_the_question_is_a_violation() {
        let mut connection = Connection::new(3, 1024, 7, BUFFER_BYTES);
        assert_eq!(connection.receive(&packet(Op::Response)), Effect::Violation);
    }

    #[test]
    fn data_is_sent_within_the_credit_and_asked_for_once() {
        let mut connection = established();
        assert_eq!(connection.sendable(), GUEST_BUFFER);
        connection.data(600);
        assert_eq!(connection.sendable(), 400);
        assert!(!connection.owes_control());
        connection.data(400);
        assert_eq!(connection.sendable(), 0);
        assert_eq!(connection.next_control().unwrap().op, 7);
        assert_eq!(connection.next_control(), None);
        let update = Packet {
            credit: Credit {
                buf_alloc: GUEST_BUFFER,
                fwd_cnt: 900,
            },
            ..packet(Op::CreditUpdate)
        };
        assert_eq!(connection.receive(&update), Effect::Proceed);
        assert_eq!(connection.sendable(), 900);
    }

    #[test]
    fn more_than_the_buffer_holds_is_a_violation() {
        let mut connection = established();
        assert_eq!(connection.receive(&data(BUFFER_BYTES)), Effect::Deliver);
        assert_eq!(connection.receive(&data(1)), Effect::Violation);
        let mut connection = established();
        assert_eq!(connection.receive(&data(u32::MAX)), Effect::Violation);
    }

    #[test]
    fn the_guest_hears_of_free_space_before_it_must_wait_for_ever() {
        let mut connection = established();
        connection.receive(&data(BUFFER_BYTES));
        connection.forward(CREDIT_NEWS_BYTES - 1);
        assert!(!connection.owes_control());
        connection.forward(1);
        let update = connection.next_control().unwrap();
        assert_eq!((update.op, update.credit.fwd_cnt), (6, CREDIT_NEWS_BYTES));
        assert!(!connection.owes_control());
    }

    #[test]
    fn a_half_close_of_the_host_leaves_the_other_direction_open() {
        let mut connection = established();
        connection.end_by_host(HostEnd::Sending);
        let shutdown = connection.next_control().unwrap();
        assert_eq!((shutdown.op, shutdown.flags), (4, SHUTDOWN_SEND));
        assert_eq!(connection.sendable(), 0);
        assert_eq!(connection.receive(&data(10)), Effect::Deliver);
    }

    #[test]
    fn a_half_close_of_the_guest_waits_for_its_data() {
        let mut connection = established();
        connection.receive(&data(10));
        assert_eq!(
            connection.receive(&shutdown(SHUTDOWN_SEND)),
            Effect::Proceed
        );
        assert!(!connection.is_drained());
        connection.forward(10);
        assert!(connection.is_drained());
        assert_eq!(connection.sendable(), GUEST_BUFFER);
        assert_eq!(connection.receive(&data(1)), Effect::Violation);
    }

    #[test]
    fn a_reset_after_the_last_byte_is_an_orderly_end() {
        let mut connection = established();
        connection.receive(&data(10));
        assert_eq!(connection.receive(&packet(Op::Reset)), Effect::Abort);
        let mut connection = established();
        connection.receive(&data(10));
        connection.receive(&shutdown(SHUTDOWN_SEND));
        assert_eq!(connection.receive(&packet(Op::Reset)), Effect::Finished);
    }

    #[test]
    fn data_for_a_host_program_that_left_is_swallowed() {
        let mut connection = established();
        connection.receive(&data(10));
        connection.end_by_host(HostEnd::Both);
        assert_eq!(connection.next_control().unwrap().flags, SHUTDOWN_BOTH);
        assert_eq!(connection.receive(&data(BUFFER_BYTES)), Effect::Proceed);
        assert_eq!(connection.buffered(), 0);
        assert_eq!(connection.receive(&shutdown(SHUTDOWN_BOTH)), Effect::Finish);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Receive(u8, u32, u32, Credit),
        Send(u32),
        Forward(u32),
        End(HostEnd),
        Control,
    }

    fn step() -> impl Strategy<Value = Step> {
        let length = prop_oneof![0u32..5000, any::<u32>()];
        let credit = (0u32..3000, any::<u32>())
            .prop_map(|(buf_alloc, fwd_cnt)| Credit { buf_alloc, fwd_cnt });
        prop_oneof![
            (0u8..7, length.clone(), 0u32..5, credit)
                .prop_map(|(op, len, flags, credit)| Step::Receive(op, len, flags, credit)),
            length.clone().prop_map(Step::Send),
            length.prop_map(Step::Forward),
            prop_oneof![
                Just(HostEnd::Sending),
                Just(HostEnd::Receiving),
                Just(HostEnd::Both)
            ]
            .prop_map(Step::End),
            Just(Step::Control),
        ]
    }

    proptest! {
        #[test]
        fn no_guest_breaks_the_limits(steps in proptest::collection::vec(step(), 0..200)) {
            let mut connection = established();
            let ops = [Op::Request, Op::Response, Op::Reset, Op::Shutdown, Op::Data,
                Op::CreditUpdate, Op::CreditRequest];
            for step in steps {
                match step {
                    Step::Receive(op, len, flags, credit) => {
                        let packet = Packet { op: ops[usize::from(op)], len, flags, credit, ..packet(Op::Data) };
                        let effect = connection.receive(&packet);
                        let over = matches!(effect, Effect::Finish | Effect::Finished | Effect::Abort | Effect::Violation);
                        if over {
                            break;
                        }
                    }
                    Step::Send(bytes) => {
                        let bytes = bytes.min(connection.sendable());
                        let before = connection.credit();
                        if bytes > 0 {
                            connection.data(bytes);
                            prop_assert_eq!(connection.credit(), before - bytes);
                        }
                    }
                    Step::Forward(bytes) => connection.forward(bytes.min(connection.buffered())),
                    Step::End(end) => connection.end_by_host(end),
                    Step::Control => {
                        prop_assert_eq!(connection.owes_control(), connection.next_control().is_some());
                    }
                }
                prop_assert!(connection.buffered() <= BUFFER_BYTES);
            }
            // What is owed comes to an end.
            for _ in 0..4 {
                connection.next_control();
            }
            prop_assert!(!connection.owes_control());
        }
    }
}
